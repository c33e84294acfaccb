"""On a GPU: graphs on demand give stock's tokens, are captured when asked for, and leave everything else alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests import process

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CODE = """
    import json, os, random, time
    from pathlib import Path
    from vllm_compile_ext import plugin
    plugin.register()
    from tests import forks
    from benchmarks import models
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.compilation import monitor
    import vllm.v1.engine.llm_engine, vllm.v1.engine.core, vllm.model_executor.models.llama
    import vllm.v1.worker.gpu_worker, vllm.v1.worker.gpu.model_runner
    os.environ["VLLM_CACHE_ROOT"] = str(Path("root").absolute())
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"

    def traffic(llm, temperature=0.0):
        '''200 prompts of mixed lengths that arrive at random steps, the same for every engine.'''
        r = random.Random(1)
        prompts = [[r.randrange(3, 1000) for _ in range(r.randrange(4, 300))] for _ in range(200)]
        at = sorted(r.randrange(150) for _ in prompts)
        lengths = [r.randrange(4, 40) for _ in prompts]
        done, step, sent = {}, 0, 0
        llm.reset_prefix_cache()
        while sent < len(prompts) or llm.llm_engine.has_unfinished_requests():
            while sent < len(prompts) and at[sent] <= step:
                params = SamplingParams(
                    temperature=temperature, seed=sent, max_tokens=lengths[sent], ignore_eos=True, logprobs=1
                )
                llm.llm_engine.add_request(f"{sent:03d}", TokensPrompt(prompt_token_ids=prompts[sent]), params)
                sent += 1
            for output in llm.llm_engine.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
        return [done[name] for name in sorted(done)]

    def manager(llm):
        return llm.llm_engine.model_executor.driver_worker.worker.model_runner.cudagraph_manager

    def about(worker):
        session = worker.model_runner.cudagraph_manager.session
        counters = session.counters
        return {
            "captured": dict(counters.captured), "replayed": dict(counters.replayed), "missed": dict(counters.missed),
            "skipped": dict(counters.skipped), "shapes": len(session.policy.shapes), "left": len(session.policy.left),
            "held": session.budget.held, "limit": session.budget.limit, "source": session.memory.need.source,
            "seconds": max(counters.seconds, default=0), "guard": monitor.cudagraph_capturing_enabled,
            "asked": sum(session.policy.asked.values()), "reasons": sorted(set(session.policy.barred.values())),
        }

    def start(then, policy="lazy", **options):
        def function():
            os.environ["VLLM_COMPILE_CUDAGRAPHS"] = policy
            limits = dict(max_num_batched_tokens=2048, max_model_len=512, gpu_memory_utilization=0.4)
            llm = LLM(model="model", dtype="bfloat16", disable_log_stats=True, **limits, **options)
            return then(llm)
        ended = forks.run(function)
        error = ended.output[-5000:] if ended.status else ""
        return {"value": ended.value, "lines": ended.lines("CUDA graph"), "error": error}

    def lazy(llm):
        from torch import cuda
        before, first = about(llm.llm_engine.model_executor.driver_worker.worker), None
        tokens = traffic(llm)
        after = about(llm.llm_engine.model_executor.driver_worker.worker)
        sampled = traffic(llm, 0.8)
        state = cuda.get_rng_state()
        manager(llm).capture_idle()
        same = bool((state == cuda.get_rng_state()).all())
        time.sleep(6)  # until the record is written
        return {"before": before, "after": after, "tokens": tokens, "sampled": sampled, "rng": same}

    def broken(llm):
        '''What is remembered; captures of a decode step's and of a prompt's shape that break off; all the rest.'''
        import torch
        session = manager(llm).session
        source, first = session.memory.need.source, session.policy.next_idle()
        most = max(session.memory.before.values())
        make = manager(llm)._create_forward_fn
        def create(desc, warmup):
            forward = make(desc, warmup)
            def run(mode):
                forward(mode)
                if torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize()
                elif mode.name == "PIECEWISE":
                    raise RuntimeError("injected")
            return run if (desc.cg_mode.name, desc.num_tokens) in (("FULL", 8), ("PIECEWISE", 256)) else forward
        manager(llm)._create_forward_fn = create
        tokens, info = traffic(llm), about(llm.llm_engine.model_executor.driver_worker.worker)
        before = torch.cuda.memory_reserved()
        big = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
        del big
        torch.cuda.empty_cache()
        given_back = torch.cuda.memory_reserved() <= before
        session.budget.limit = 1 << 40
        while manager(llm).capture_idle():
            pass
        full = about(llm.llm_engine.model_executor.driver_worker.worker)
        return {
            "tokens": tokens, "info": info, "source": source, "first": session.memory.before[first] == most,
            "given back": given_back, "full": full, "tokens of all": traffic(llm),
        }

    def again(llm):
        '''What a server does between its start and the first request.'''
        worker = llm.llm_engine.model_executor.driver_worker.worker
        policy = manager(llm).session.policy
        before = {s for s in policy.shapes if policy.remembered[s] >= (1 if s.kind == "FULL" else 4)}
        while manager(llm).capture_idle(remembered=True):
            pass
        known = policy.captured == before
        return {"known": known, "before": about(worker), "tokens": traffic(llm), "after": about(worker)}

    def poor(llm):
        manager(llm).session.budget.limit = 0
        tokens, info = traffic(llm), about(llm.llm_engine.model_executor.driver_worker.worker)
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
        made = forks.run(lambda: str(models.llama(Path("model"), "n8", dtype="bfloat16")))
        assert made.status == 0, made.output
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        out = {"lazy": start(lazy), "again": start(again), "broken": start(broken), "poor": start(poor)}
        out["eager"] = start(plain, "eager")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for collective_rpc of a function
        report(out | {"idle": start(idle, "idle")})
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(CODE, folder=tmp_path_factory.mktemp("cudagraphs"))
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


@pytest.mark.parametrize("name", ["lazy", "again", "broken", "poor", "eager", "idle"])
def test_every_engine_serves(ran: dict[str, Any], name: str) -> None:
    assert ran[name]["error"] == ""


def _tokens(ran: dict[str, Any], name: str, kind: str = "tokens") -> list[list[int]]:
    tokens: list[list[int]] = ran[name]["value"][kind]
    return tokens


@pytest.mark.parametrize("name", ["lazy", "again", "broken", "poor", "idle"])  # "poor" has no graph at all
def test_the_tokens_are_those_of_stock_capture(ran: dict[str, Any], name: str) -> None:
    expected = _tokens(ran, "eager")
    assert len(expected) == 200
    assert len({tuple(tokens) for tokens in expected}) > 150
    assert _tokens(ran, name) == expected


def test_the_tokens_are_those_of_stock_capture_when_all_is_captured(ran: dict[str, Any]) -> None:
    full = ran["broken"]["value"]["full"]
    assert full["left"] == 0
    assert sum(full["captured"].values()) + sum(full["skipped"].values()) == full["shapes"]
    assert _tokens(ran, "broken", "tokens of all") == _tokens(ran, "eager")


def test_sampled_tokens_too(ran: dict[str, Any]) -> None:
    assert _tokens(ran, "lazy", "sampled") == _tokens(ran, "eager", "sampled")


def test_nothing_is_captured_at_start_and_only_what_is_asked_for_later(ran: dict[str, Any]) -> None:
    before, after = ran["lazy"]["value"]["before"], ran["lazy"]["value"]["after"]
    assert before["captured"] == {}
    assert before["asked"] == 0
    assert 0 < sum(after["captured"].values()) < after["shapes"] / 2
    assert after["replayed"]["FULL"] > after["missed"].get("FULL", 0)
    assert after["held"] <= after["limit"]


def test_a_capture_leaves_the_random_state_alone(ran: dict[str, Any]) -> None:
    assert ran["lazy"]["value"]["rng"]


def test_the_guard_is_closed_for_everyone_else(ran: dict[str, Any]) -> None:
    assert not ran["lazy"]["value"]["before"]["guard"]
    assert not ran["lazy"]["value"]["after"]["guard"]


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
    lines = [line for line in ran["broken"]["lines"] if "capturing it failed" in line]
    assert len(lines) == sum(broken["skipped"].values())


def test_torch_gives_memory_back_after_a_capture_that_failed(ran: dict[str, Any]) -> None:
    assert ran["broken"]["value"]["given back"]


def test_without_a_budget_nothing_is_captured(ran: dict[str, Any]) -> None:
    assert ran["poor"]["value"]["info"]["captured"] == {}
    assert len([line for line in ran["poor"]["lines"] if "are used up" in line]) == 2  # one for each kind


def test_idle_captures_what_memory_allows_without_a_request(ran: dict[str, Any]) -> None:
    idle = ran["idle"]["value"]["info"]
    assert idle["left"] == 0
    assert sum(idle["captured"].values()) + sum(idle["skipped"].values()) == idle["shapes"]
