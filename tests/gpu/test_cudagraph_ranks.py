"""On two GPUs: tensor parallel ranks capture the same shapes in the same steps, and give stock's tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tests import process

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CODE = """
    import os
    from tests.gpu.engines import about, make, start, traffic

    def fail_on_the_second(worker):
        manager = worker.model_runner.cudagraph_manager
        stock = manager._create_forward_fn
        def create(desc, warmup):
            if worker.rank == 1 and (desc.cg_mode.name, desc.num_tokens) == ("FULL", 8):
                raise RuntimeError("injected")
            return stock(desc, warmup)
        manager._create_forward_fn = create

    def lazy(llm):
        return {"tokens": traffic(llm), "ranks": llm.collective_rpc(about)}

    def broken(llm):
        llm.collective_rpc(fail_on_the_second)
        return lazy(llm)

    if __name__ == "__main__":  # not a process that vLLM spawns
        make("n8")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        out = {name: start(then, tensor_parallel_size=2) for name, then in (("lazy", lazy), ("broken", broken))}
        report(out | {"eager": start(lambda llm: {"tokens": traffic(llm)}, "eager", tensor_parallel_size=2)})
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    outcome = process.run(CODE, folder=tmp_path_factory.mktemp("ranks"))
    assert outcome.code == 0, outcome.output[-5000:]
    for name, engine in outcome.value.items():
        print(name, *engine["lines"], sep="\n")  # shown where a test fails
    return outcome.value


@pytest.mark.parametrize("name", ["lazy", "broken", "eager"])
def test_every_engine_serves(ran: dict[str, Any], name: str) -> None:
    assert ran[name]["error"] == ""


@pytest.mark.parametrize("name", ["lazy", "broken"])
def test_the_tokens_are_those_of_stock_capture(ran: dict[str, Any], name: str) -> None:
    expected = ran["eager"]["value"]["tokens"]
    assert len({tuple(tokens) for tokens in expected}) > 150
    assert ran[name]["value"]["tokens"] == expected


@pytest.mark.parametrize("name", ["lazy", "broken"])
def test_every_rank_captures_and_replays_the_same(ran: dict[str, Any], name: str) -> None:
    first, second = ran[name]["value"]["ranks"]
    assert first["captured"]["FULL"] > 0
    for what in ("captured", "replayed", "missed", "skipped", "left", "asked"):
        assert first[what] == second[what]


def test_a_capture_that_fails_on_one_rank_is_given_up_on_both(ran: dict[str, Any]) -> None:
    first, second = ran["broken"]["value"]["ranks"]
    assert first["skipped"]["FULL"] == second["skipped"]["FULL"] == 1
    assert first["reasons"] == ["RanksDifferError: it failed on another rank"]
    assert second["reasons"][0].startswith("RuntimeError in ")
