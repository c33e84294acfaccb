"""Starts that more than one module looks at: `vllm serve` and what became of it, and an engine by `LLM`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import Server
from tests import otlp, process
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import Start

PTH = process.ROOT / "vllm_compile_ext.pth"
ARGS = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--max-model-len", "256")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "200"}
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


def path_with_pth(folder: Path) -> str:
    """PYTHONPATH with which Python runs the wheel's .pth file, as it does where the plugin is installed."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(PTH.read_text())
    return os.pathsep.join([str(folder), process.BASE["PYTHONPATH"]])


def recorded(cache: Path) -> list[Start]:
    return [read.read(path) for path in read.recorded(cache / "compile_starts")]


@dataclass(frozen=True)
class Served:
    """began, answered: unix ns, by the one who started it and asked.  blobs: the store's, at the end."""

    start: Start
    began: int
    answered: int
    log: str
    received: list[otlp.Received]
    metrics: str
    answers: list[dict[str, Any]]
    cache: Path
    blobs: set[Path]


def serve(
    model: Path, folder: Path, name: str, receiver: otlp.Receiver, env: dict[str, str], *args: str, path: str
) -> Served:
    """A start on the cache in `folder`, and three requests."""
    cache = folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        server = Server(model, folder / f"{name}.log", cache, args=(*ARGS, *args), env=QUICK | env)
    began = time.time_ns()
    with server:
        server.wait_ready()
        server.post("/v1/completions", {"prompt": "def f(x):", "max_tokens": 1})
        answered = time.time_ns()
        answers = [
            server.post("/v1/completions", GREEDY | {"prompt": "def f(x):"}),
            server.post("/v1/chat/completions", GREEDY | {"messages": [{"role": "user", "content": "hello"}]}),
        ]
        time.sleep(2)  # exporters send what they have five times a second
        metrics = server.get("/metrics")
    log, blobs = (folder / f"{name}.log").read_text(), set(cache.rglob("blobs/*/*"))
    choices = [answer["choices"][0] for answer in answers]
    return Served(recorded(cache)[-1], began, answered, log, list(receiver.spans), metrics, choices, cache, blobs)


ENGINE = """
    import os
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        limits = dict(max_num_batched_tokens=256, max_model_len=256, gpu_memory_utilization=0.4, dtype="float32")
        llm = LLM(sys.argv[1], **limits, **json.loads(sys.argv[2]))
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for prompts in (["x"], ["The import statement", "def f(x):", "x"]):
            outputs = llm.generate(prompts, params, use_tqdm=False)
        from opentelemetry import trace
        report(dict(tokens=[list(o.outputs[0].token_ids) for o in outputs],
                    env=[os.environ.get(n) for n in ("traceparent", "_VLLM_COMPILE_EXT_START")],
                    provider=type(trace.get_tracer_provider()).__name__))
"""
MANY = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def two_ranks(model: Path, folder: Path, cache: Path) -> process.Outcome:
    """By `LLM`, whose processes are forked."""
    options = json.dumps({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"})
    env = MANY | {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CACHE_ROOT": str(cache)}
    outcome = process.run(ENGINE, str(model), options, folder=folder, **env)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome
