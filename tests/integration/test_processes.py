"""Engines by `LLM` and what they leave: two tensor-parallel ranks, a second engine in one process, deaths, secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests import engine, process, recorded
from vllm_compile_ext.key.seen import Seen
from vllm_compile_ext.record import phases
from vllm_compile_ext.record.read import Start
from vllm_compile_ext.store.store import Store

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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to cores of its own")
def test_two_ranks_compile_a_common_piece_once(llama2: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    cold, warm = (
        process.run(
            ENGINE,
            str(llama2),
            json.dumps({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"} | options),
            folder=tmp_path / name,
            fork=name == "warm",
            VLLM_CACHE_ROOT=str(root),
            VLLM_CPU_OMP_THREADS_BIND="0|1",
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
        )
        for name, options in (("cold", {"additional_config": {"compile_ext": {"workers": 3}}}), ("warm", {}))
    )
    assert (cold.code, warm.code) == (0, 0), cold.output[-5000:] + warm.output[-5000:]
    # The workers' processes have the settings of their engine, which are not in the key: the other one loads.
    said = re.findall(r"compiled (\d+) pieces with 3 workers, loaded (\d+) that another", cold.output)
    assert len(said) == 2
    # Three distinct pieces a rank; the first holds the rank's part of the vocabulary and is another one in each.
    assert sum(int(compiled) for compiled, _ in said) == 4
    assert sum(int(loaded) for _, loaded in said) == 2

    # What the record used while it was written is gone.
    assert cold.value["env"] == [None, None]
    assert cold.value["provider"] == "ProxyTracerProvider"
    found = recorded.starts(root)[0]
    recorded.check_whole(found)
    workers = {one.rank: one.pid for one in found.processes if one.kind == "worker"}
    assert workers.keys() == {0, 1}
    for pid in workers.values():
        names = [span.name for span in found.spans if span.pid == pid]
        assert [names.count(n) for n in ("distributed init", "Load weights", "compile", "Allocate KV cache")] == [1] * 4

    assert len(warm.lines("loaded compiled code")) == 2
    assert not warm.lines("cache miss")
    assert cold.value["tokens"] == warm.value["tokens"] == engine.greedy(llama2, 12)


def test_a_worker_that_is_killed_leaves_the_phase_it_died_in(llama2: Path, tmp_path: Path) -> None:
    root, options = tmp_path / "root", '{"distributed_executor_backend": "mp"}'
    env = {"VLLM_CACHE_ROOT": str(root), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    started = process.start(ENGINE, tmp_path / "run", str(llama2), options, **env)
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


CANARY = "Canary7f3a"
TWICE = f"""
    import logging, os
    ours = logging.getLogger("vllm_compile_ext")
    ours.addHandler(logging.FileHandler("ours.log"))
    ours.setLevel(logging.DEBUG)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        LLM(sys.argv[1], dtype="float32", **{engine.LIMITS})
    except Exception as error:
        failed = type(error).__name__
    cleanup_dist_env_and_memory()
    CANARY = os.environ["A_TOKEN"]
    llm = LLM(
        sys.argv[2], dtype="float32", **{engine.LIMITS},
        additional_config={{"api_key": CANARY, "x": {{"y": CANARY}}}},
        hf_overrides={{"note": CANARY, "nested": {{"token": CANARY}}, "url": f"https://u:{{CANARY}}@h"}},
        served_model_name=f"https://user:{{CANARY}}@host/{{CANARY}}?token={{CANARY}}",
        download_dir=f"/tmp/{{CANARY}}",
    )
    llm.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)
    from prometheus_client import generate_latest
    report([failed, generate_latest().decode()])
"""


@dataclass(frozen=True)
class Twice:
    folder: Path
    failed: Start
    second: Start
    metrics: str


@pytest.fixture(scope="module")
def twice(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Twice:
    """In one process, an engine whose weights are cut short, and one that comes up; then vLLM's metrics.

    Options of the second, variables and the command line hold `CANARY`.
    """
    folder = tmp_path_factory.mktemp("twice")
    (folder / "tmp").mkdir()
    broken = shutil.copytree(llama2, folder / "broken")
    os.truncate(broken / "model.safetensors", (broken / "model.safetensors").stat().st_size - 1000)
    names = ("A_TOKEN", "VLLM_UNKNOWN_TO_ALL", "VLLM_GC_DEBUG", "VLLM_IMAGE_TAG", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY")
    env = dict.fromkeys(names, CANARY) | {"VLLM_LOGGING_LEVEL": "DEBUG"}
    env |= {"VLLM_CACHE_ROOT": str(folder / "root"), "TMPDIR": str(folder / "tmp")}
    outcome = process.run(TWICE, str(broken), str(llama2), CANARY, folder=folder / "run", **env)
    assert outcome.code == 0, outcome.output[-3000:]
    assert outcome.value[0] == "SafetensorError"
    failed, second = recorded.starts(folder / "root")
    return Twice(folder, failed, second, outcome.value[1])


def test_an_error_while_weights_load_is_in_the_record(twice: Twice) -> None:
    death = phases.death(twice.failed)
    assert death is not None
    assert death.phase == "weights"
    assert death.error is not None
    assert "SafetensorError" in death.error
    assert [gone.error for gone in twice.failed.exits if gone.error]
    assert twice.failed.ready is None


def test_one_process_and_its_second_engine(twice: Twice) -> None:
    second = twice.second
    recorded.check_whole(second)
    assert [one.kind for one in second.processes if one.kind != "helper"] == ["front end"]
    assert second.begin > twice.failed.last
    names = ("store_misses", "store_hits", "pieces_compiled", "pieces_loaded")
    counted = [re.search(rf"^vllm_compile_ext_{n}_total (\S+)$", twice.metrics, re.MULTILINE) for n in names]
    assert [found and float(found[1]) for found in counted] == [1, 0, 3, 0]
    assert {"compile", "weights", "first request"} <= {span.phase for span in second.spans}


def test_what_may_be_secret_is_in_no_file_and_in_no_line_of_ours(twice: Twice) -> None:
    paths = [path for name in ("root", "tmp") for path in (twice.folder / name).rglob("*")]
    files, log = [path for path in paths if path.is_file()], twice.folder / "run" / "ours.log"
    assert len(files) > 10
    assert [path for path in (*files, log) if CANARY.encode() in path.read_bytes()] == []
    assert [path for path in paths if CANARY in path.name] == []
    assert "cache miss" in log.read_text()
    store = Store.open(twice.folder / "root" / "compile_store")
    (manifest,) = [each for each in store.manifests() if each.kind == "program"]
    assert manifest.factors["config.additional.api_key"].startswith("***")
    assert manifest.factors["config.model.hf_config.nested.token"].startswith("***")
    seen = msgspec.msgpack.decode(store.get(manifest.members["seen"]), type=Seen)
    assert CANARY.encode() not in zlib.decompress(seen.lines)
