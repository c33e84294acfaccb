"""Engines by `LLM` and the record they leave: two tensor-parallel ranks, a second engine in one process, and deaths."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import engine, process, recorded
from vllm_compile_ext.record import phases
from vllm_compile_ext.record.read import Start

pytestmark = pytest.mark.engine

ENGINE = f"""
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        llm = LLM(sys.argv[1], dtype="float32", **{engine.LIMITS}, **json.loads(sys.argv[2]))
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for prompts in (["x"], {engine.PROMPTS}):
            outputs = llm.generate(prompts, params, use_tqdm=False)
        import os
        from opentelemetry import trace
        report(dict(tokens=[list(o.outputs[0].token_ids) for o in outputs],
                    env=[os.environ.get(n) for n in ("traceparent", "_VLLM_COMPILE_EXT_START")],
                    provider=type(trace.get_tracer_provider()).__name__))
"""
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def start(
    model: Path, folder: Path, root: Path, options: dict[str, Any], *, fork: bool = False, **env: str
) -> process.Outcome:
    env["VLLM_CACHE_ROOT"] = str(root)
    outcome = process.run(ENGINE, str(model), json.dumps(options), folder=folder, fork=fork, **env)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to cores of its own")
def test_two_ranks_compile_a_common_piece_once(llama2: Path, tmp_path: Path) -> None:
    root, bound = tmp_path / "root", SEVERAL | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    cold = start(llama2, tmp_path / "cold", root, TWO_RANKS, **bound)
    said = re.findall(r"compiled (\d+) pieces with \d+ workers, loaded (\d+) that another", cold.output)
    assert len(said) == 2
    # Three distinct pieces a rank; the first holds the rank's part of the vocabulary and is another one in each.
    assert sum(int(compiled) for compiled, _ in said) == 4
    assert sum(int(loaded) for _, loaded in said) == 2

    # What the record used while it was written is gone.
    assert cold.value["env"] == [None, None]
    assert cold.value["provider"] == "ProxyTracerProvider"
    (found,) = recorded.starts(root)
    recorded.check_whole(found)
    workers = {one.rank: one.pid for one in found.processes if one.kind == "worker"}
    assert workers.keys() == {0, 1}
    for pid in workers.values():
        names = [span.name for span in found.spans if span.pid == pid]
        assert [names.count(n) for n in ("distributed init", "Load weights", "compile", "Allocate KV cache")] == [1] * 4

    warm = start(llama2, tmp_path / "warm", root, TWO_RANKS, fork=True, **bound)
    assert len(warm.lines("loaded compiled code")) == 2
    assert not warm.lines("cache miss")
    one = start(llama2, tmp_path / "one", root, {"enforce_eager": True}, fork=True)
    assert cold.value["tokens"] == warm.value["tokens"] == one.value["tokens"]


def test_a_worker_that_is_killed_leaves_the_phase_it_died_in(llama2: Path, tmp_path: Path) -> None:
    root, options = tmp_path / "root", '{"distributed_executor_backend": "mp"}'
    started = process.start(ENGINE, tmp_path / "run", str(llama2), options, VLLM_CACHE_ROOT=str(root), **SEVERAL)
    while not (found := [s for one in recorded.starts(root) for s in one.spans if s.name == "piece 0"]):
        time.sleep(0.1)
    os.kill(found[0].pid, signal.SIGKILL)
    assert process.finish(started, tmp_path / "run").code != 0
    (killed,) = recorded.starts(root)
    death = phases.death(killed)
    assert death is not None
    assert death.process is not None
    assert (death.phase, death.process.kind) == ("compile", "worker")
    assert killed.ready is None


TWICE = f"""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        LLM(sys.argv[1], dtype="float32", **{engine.LIMITS})
    except Exception as error:
        failed = type(error).__name__
    cleanup_dist_env_and_memory()
    llm = LLM(sys.argv[2], dtype="float32", **{engine.LIMITS})
    llm.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)
    from prometheus_client import generate_latest
    report([failed, generate_latest().decode()])
"""


@pytest.fixture(scope="module")
def twice(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Start, Start, str]:
    """In one process, an engine whose weights are cut short, and one that comes up; then vLLM's metrics."""
    folder = tmp_path_factory.mktemp("twice")
    broken = shutil.copytree(llama2, folder / "broken")
    os.truncate(broken / "model.safetensors", (broken / "model.safetensors").stat().st_size - 1000)
    root = folder / "root"
    outcome = process.run(TWICE, str(broken), str(llama2), folder=folder / "run", VLLM_CACHE_ROOT=str(root))
    assert outcome.code == 0, outcome.output[-3000:]
    assert outcome.value[0] == "SafetensorError"
    first, second = recorded.starts(root)
    return first, second, outcome.value[1]


def test_an_error_while_weights_load_is_in_the_record(twice: tuple[Start, Start, str]) -> None:
    death = phases.death(twice[0])
    assert death is not None
    assert death.phase == "weights"
    assert death.error is not None
    assert "SafetensorError" in death.error
    assert [gone.error for gone in twice[0].exits if gone.error]
    assert twice[0].ready is None


def test_one_process_and_its_second_engine(twice: tuple[Start, Start, str]) -> None:
    failed, second, metrics = twice
    recorded.check_whole(second)
    assert [one.kind for one in second.processes if one.kind != "helper"] == ["front end"]
    assert second.begin > failed.last
    names = ("store_misses", "store_hits", "pieces_compiled", "pieces_loaded")
    counted = [re.search(rf"^vllm_compile_ext_{n}_total (\S+)$", metrics, re.MULTILINE) for n in names]
    assert [found and float(found[1]) for found in counted] == [1, 0, 3, 0]
    assert {"compile", "weights", "first request"} <= {span.phase for span in second.spans}
