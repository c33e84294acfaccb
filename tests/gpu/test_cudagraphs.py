"""On a GPU: graphs on demand give stock's tokens, are captured when asked for, and leave everything else alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests import process

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CODE = """
    import os, time
    from tests.gpu.engines import about, make, start, traffic
    from vllm_compile_ext.cuda_graphs import memory

    def worker(llm):
        return llm.llm_engine.model_executor.driver_worker.worker

    def manager(llm):
        return worker(llm).model_runner.cudagraph_manager

    def lazy(llm):
        from torch import cuda
        before = about(worker(llm))
        tokens = traffic(llm)
        after = about(worker(llm))
        sampled = traffic(llm, 0.8)
        state = cuda.get_rng_state()
        for _ in range(3):
            manager(llm).use_gap(everything=True)
        same = bool((state == cuda.get_rng_state()).all())
        time.sleep(memory.DELAY + 1)  # until the record is written
        return {"before": before, "after": after, "tokens": tokens, "sampled": sampled, "rng": same}

    def broken(llm):
        '''What is remembered; captures of a decode step's and of a prompt's shape that break off; all the rest.'''
        import torch
        session = manager(llm).session
        source, first = session.budget.source, session.policy.next_in_gap(everything=True)
        most = max(session.policy.remembered.values())
        stock = manager(llm)._create_forward_fn
        def create(desc, warmup):
            forward = stock(desc, warmup)
            def run(mode):
                forward(mode)
                if torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize()
                elif mode.name == "PIECEWISE":
                    raise RuntimeError("injected")
            return run if (desc.cg_mode.name, desc.num_tokens) in (("FULL", 8), ("PIECEWISE", 256)) else forward
        manager(llm)._create_forward_fn = create
        tokens, info = traffic(llm), about(worker(llm))
        before = torch.cuda.memory_reserved()
        big = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
        del big
        torch.cuda.empty_cache()
        given_back = torch.cuda.memory_reserved() <= before
        session.budget.limit = 1 << 40
        while manager(llm).use_gap(everything=True):
            pass
        full = about(worker(llm))
        return {
            "tokens": tokens, "info": info, "source": source, "first": session.policy.remembered[first] == most,
            "given back": given_back, "full": full, "tokens of all": traffic(llm),
        }

    def again(llm):
        '''What a server does between its start and the first request.'''
        policy = manager(llm).session.policy
        before = {s for s in policy.shapes if policy.remembered[s] >= (1 if s.kind == "FULL" else 4)}
        while manager(llm).use_gap(everything=False):
            pass
        known = policy.captured == before and before <= policy.times.keys()
        return {"known": known, "before": about(worker(llm)), "tokens": traffic(llm), "after": about(worker(llm))}

    def poor(llm):
        manager(llm).session.budget.limit = 0
        tokens, info = traffic(llm), about(worker(llm))
        return {"tokens": tokens, "info": info}

    def plain(llm):
        return {"tokens": traffic(llm), "sampled": traffic(llm, 0.8)}

    def idle(llm):
        for _ in range(100):
            [info] = llm.collective_rpc(about)
            if info["left"] == 0:
                break
            time.sleep(0.2)
        return {"info": info, "tokens": traffic(llm)}

    if __name__ == "__main__":  # not a process that vLLM spawns
        make("n8")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        out = {"lazy": start(lazy), "again": start(again), "broken": start(broken), "poor": start(poor)}
        out["eager"] = start(plain, "eager")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        report(out | {"idle": start(idle, "idle")})
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(CODE, folder=tmp_path_factory.mktemp("cudagraphs"))
    assert outcome.code == 0, outcome.output[-5000:]
    for name, engine in outcome.value.items():
        print(name, *engine["lines"], sep="\n")  # shown where a test fails
    return outcome.value


@pytest.mark.parametrize("name", ["lazy", "again", "broken", "poor", "eager", "idle"])
def test_every_engine_serves(ran: dict[str, Any], name: str) -> None:
    assert ran[name]["error"] == ""


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *[(name, "tokens") for name in ("lazy", "again", "broken", "poor", "idle")],  # "poor" has no graph at all
        ("broken", "tokens of all"),  # when all is captured
        ("lazy", "sampled"),
    ],
)
def test_the_tokens_are_those_of_stock_capture(ran: dict[str, Any], name: str, what: str) -> None:
    expected = ran["eager"]["value"]["sampled" if what == "sampled" else "tokens"]
    assert len(expected) == 200
    assert len({tuple(tokens) for tokens in expected}) > 150
    assert ran[name]["value"][what] == expected


@pytest.mark.parametrize(("name", "when"), [("broken", "full"), ("idle", "info")])
def test_all_is_captured_that_can_be(ran: dict[str, Any], name: str, when: str) -> None:
    found = ran[name]["value"][when]
    assert found["left"] == 0
    assert sum(found["captured"].values()) + sum(found["skipped"].values()) == found["shapes"]


def test_nothing_is_captured_at_start_and_only_what_is_asked_for_later(ran: dict[str, Any]) -> None:
    before, after = ran["lazy"]["value"]["before"], ran["lazy"]["value"]["after"]
    assert before["captured"] == {}
    assert before["asked"] == 0
    assert 0 < sum(after["captured"].values()) < after["shapes"] / 2
    assert after["replayed"]["FULL"] > after["missed"].get("FULL", 0)
    assert after["held"] <= after["limit"]


def test_a_capture_leaves_the_random_state_alone_and_the_guard_closed_for_everyone_else(ran: dict[str, Any]) -> None:
    lazy = ran["lazy"]["value"]
    assert lazy["rng"]
    assert not lazy["before"]["guard"]
    assert not lazy["after"]["guard"]


def test_the_next_start_remembers(ran: dict[str, Any]) -> None:
    assert ran["lazy"]["value"]["after"]["source"] == "an estimate"
    assert "in an earlier start" in ran["broken"]["value"]["source"]
    assert ran["broken"]["value"]["first"]


def test_before_the_first_request_what_earlier_traffic_used_is_captured(ran: dict[str, Any]) -> None:
    again = ran["again"]["value"]
    assert again["known"]
    assert again["before"]["captured"]["FULL"] >= 3
    missed, first = (sum(value["missed"].values()) for value in (again["after"], ran["lazy"]["value"]["after"]))
    assert missed < first / 2


def test_a_capture_that_fails_costs_its_shape_only(ran: dict[str, Any]) -> None:
    broken = ran["broken"]["value"]["info"]
    assert len(broken["reasons"]) in (1, 2)
    assert 1 <= sum(broken["skipped"].values()) <= 2
    assert broken["captured"]["FULL"] > 0
    assert ran["broken"]["value"]["full"]["skipped"] == {"FULL": 1, "PIECEWISE": 1}
    assert len([line for line in ran["broken"]["lines"] if "capturing it failed" in line]) == 2


def test_torch_gives_memory_back_after_a_capture_that_failed(ran: dict[str, Any]) -> None:
    assert ran["broken"]["value"]["given back"]


def test_without_a_budget_nothing_is_captured(ran: dict[str, Any]) -> None:
    assert ran["poor"]["value"]["info"]["captured"] == {}
    assert len([line for line in ran["poor"]["lines"] if "are used up" in line]) == 2  # one for each kind
