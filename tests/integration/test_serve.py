"""`vllm serve`, its front end, engine core and worker in processes of their own: cold, then warm.

Both are asked the same, export their traces, and leave a record; a third start has two API servers.
"""

from __future__ import annotations

import os
import re
import signal
import sysconfig
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import Server, environment
from tests import otlp, process, recorded
from vllm_compile_ext.record import phases
from vllm_compile_ext.record.read import Span, Start

pytestmark = pytest.mark.engine

PTH = process.ROOT / "vllm_compile_ext.pth"
# Where the environment has this one, every process does.
INSTALLED = PTH.read_text() in [path.read_text() for path in Path(sysconfig.get_paths()["purelib"]).glob(PTH.name)]
ARGS = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--max-model-len", "256")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # an orchestrator's
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


@dataclass(frozen=True)
class Served:
    """A start, and what it answered.  began, answered: unix ns, by who asked.  blobs: the store's, at the end."""

    cache: Path
    began: int
    answered: int
    answers: list[dict[str, Any]]
    metrics: str
    log: str
    received: list[otlp.Received]
    start: Start
    blobs: set[Path]

    def notes(self) -> dict[str, dict[str, Any]]:
        return {note.name: note.attrs for note in self.start.notes}

    def count(self, name: str) -> float:
        """One of the plugin's metrics without labels."""
        found = re.search(rf"^vllm_compile_ext_{name} (\S+)$", self.metrics, re.MULTILINE)
        assert found is not None, name
        return float(found[1])


def serve(model: Path, cache: Path, receiver: otlp.Receiver, *args: str, interrupt: bool = False, **env: str) -> Served:
    """Start a server, ask it, and end it, by Ctrl-C or by SIGTERM."""
    log, began = cache.parent / "log", time.time_ns()
    with Server(model, log, cache, args=(*ARGS, *args), env=env | {"OTEL_BSP_SCHEDULE_DELAY": "200"}) as server:
        server.wait_ready()
        server.post("/v1/completions", GREEDY | {"prompt": "def f(x):", "max_tokens": 1})
        answered, answers = time.time_ns(), []
        for path, asked in (
            ("/v1/completions", {"prompt": "def f(x):"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ):
            answers += server.post(path, GREEDY | asked)["choices"]
        time.sleep(2)  # exporters send what they have every 200 ms
        metrics = server.get("/metrics")
        if interrupt:
            os.kill(server.pid, signal.SIGINT)
            assert server.wait(server.elapsed() + 60) == 0
    start, blobs = recorded.starts(cache)[-1], set(cache.rglob("blobs/*/*"))
    return Served(cache, began, answered, answers, metrics, log.read_text(), list(receiver.spans), start, blobs)


def python_path(cache: Path, *more: Path) -> dict[str, str]:
    """PYTHONPATH with this repository, with what `benchmarks.serve` needs there, and `more` before both."""
    parts = [*map(str, more), process.BASE["PYTHONPATH"], environment(cache, {})["PYTHONPATH"]]
    return {"PYTHONPATH": os.pathsep.join(filter(None, parts))}


@pytest.fixture(scope="module")
def cold(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """With imports timed, an orchestrator's trace, and vLLM told to export."""
    folder = tmp_path_factory.mktemp("served")
    cache, site = folder / "cache", folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(PTH.read_text())  # as in an environment where the wheel is installed
    env = {"TRACEPARENT": f"00-{TRACE}-{PARENT}-01"} | python_path(cache, site)
    with otlp.grpc_receiver() as receiver:
        endpoint = ("--otlp-traces-endpoint", receiver.endpoint)
        return serve(llama2, cache, receiver, *endpoint, interrupt=True, **env)


@pytest.fixture(scope="module")
def warm(llama2: Path, cold: Served) -> Served:
    """Without the .pth file, and exporting as OpenTelemetry's own variables say."""
    with otlp.http_receiver() as receiver:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        return serve(llama2, cold.cache, receiver, **env, **python_path(cold.cache))


@pytest.fixture(params=["cold", "warm"])
def served(request: pytest.FixtureRequest) -> Served:
    found: Served = request.getfixturevalue(request.param)
    return found


def test_a_warm_start_compiles_nothing_and_answers_the_same(cold: Served, warm: Served) -> None:
    assert cold.answers == warm.answers
    assert cold.answers[0]["text"]
    assert cold.answers[1]["message"]["content"]
    assert cold.blobs
    assert warm.blobs == cold.blobs
    for said in ("cache miss: nothing is stored yet", "kept as"):
        assert said in cold.log
    assert "loaded compiled code" in warm.log
    assert "cache miss" not in warm.log


def test_each_process_says_once_that_the_plugin_is_active(served: Served) -> None:
    said = [line for line in served.log.splitlines() if "vllm-compile-ext" in line and "is active" in line]
    processes = ("MainProcess", "EngineCore", "Worker")  # vLLM's front end has no other name yet
    assert [sum(name in line for line in said) for name in processes] == [1, 1, 1]
    assert all("INFO" in line for line in said)
    assert "Unknown vLLM environment variable" not in served.log


def test_metrics(cold: Served, warm: Served) -> None:
    names = ("store_misses_total", "pieces_compiled_total", "store_hits_total", "pieces_loaded_total")
    assert [cold.count(name) for name in names] == [1, 3, 0, 0]
    assert [warm.count(name) for name in names] == [0, 0, 1, 3]
    assert cold.count("store_kept_bytes_total") > 10_000 < warm.count("store_loaded_bytes_total")
    assert 'vllm_compile_ext_startup_seconds{phase="load compiled code"}' in warm.metrics


def test_metrics_with_two_api_servers(llama2: Path, warm: Served, tmp_path: Path) -> None:
    args = (*ARGS, "--api-server-count", "2")
    with tempfile.TemporaryDirectory() as temporary:  # short: vLLM's sockets lie in it
        with Server(llama2, tmp_path / "log", warm.cache, args=args, env={"TMPDIR": temporary}) as server:
            server.wait_ready()
            pages = [server.get("/metrics") for _ in range(6)]  # from either server
            folders = list(Path(temporary).glob("vllm-compile-ext-run-*"))
        assert not any(folder.exists() for folder in folders), "the front end removes it"
    for page in pages:
        assert re.findall(r"\nvllm_compile_ext_store_hits_total (\S+)", page) == ["1.0"]
        assert "\nvllm:" in page
    assert len(folders) == 1


def test_the_record_is_whole_and_spans_the_start_as_seen_from_outside(served: Served) -> None:
    recorded.check_whole(served.start)
    kinds = Counter(one.kind for one in served.start.processes)
    assert (kinds["front end"], kinds["engine core"], kinds["worker"]) == (1, 1, 1)
    span, measured = recorded.root(served.start), served.answered - served.began
    assert span.end is not None
    assert span.end - span.start == pytest.approx(measured, rel=0.05)
    assert span.start == pytest.approx(served.began, abs=0.05 * measured)


def test_every_phase_of_a_server_is_there(cold: Served, warm: Served) -> None:
    common = {"imports", "config", "plugin", "spawn", "model construction", "weights", "kv cache", "api server"}
    common |= {"first request", "distributed", "warm-up", "memory profiling"}
    found, again = ({span.phase for span in served.start.spans} for served in (cold, warm))
    assert common | {"interpreter", "compile"} <= found
    assert common | {"load compiled code"} <= again
    assert ("interpreter" in again) == INSTALLED

    # Heavy imports are told apart where the .pth file is installed, and made once: engine and worker are forks.
    helpers = {one.pid for one in cold.start.processes if one.kind == "helper"}  # vLLM looks at the model in one
    imports = [span.name for span in cold.start.spans if span.pid not in helpers]
    assert [imports.count(f"import {name}") for name in ("vllm", "torch", "transformers")] == [1, 1, 1]
    again = [span.name for span in warm.start.spans]
    assert again.count("import torch") == (1 if INSTALLED else 0)
    assert "imports" in again


def test_vllms_spans_and_ours_are_in_each_other(cold: Served) -> None:
    spans = {span.id: span for span in cold.start.spans}

    def above(name: str) -> list[str]:
        at: Span | None = next(span for span in cold.start.spans if span.name == name)
        path = []
        while at := spans.get(at.parent or ""):
            path.append(at.name)
        return path

    assert "worker 0" in above("Load weights")
    path = above("piece 0")
    assert path[:5] == ["trace", "compile", "Warmup (CPU)", "memory profiling", "worker 0"]
    assert path[-2:] == ["engine client", "start"]
    assert "EngineCore" in path


def test_what_was_started_compiled_and_loaded_is_noted(cold: Served, warm: Served, llama2: Path) -> None:
    assert {"key", "miss", "compiled", "kept"} <= cold.notes().keys()
    assert cold.notes()["miss"]["why"] == "cache miss: nothing is stored yet"
    assert cold.notes()["compiled"]["distinct"] == 3
    assert warm.notes().keys() == {"key", "loaded"}
    assert warm.notes()["loaded"]["key"] == cold.notes()["kept"]["key"]
    assert warm.notes()["loaded"]["seconds"] > 0
    assert (cold.start.temperature, warm.start.temperature) == ("cold", "warm")

    # The first line says what was started.
    start = cold.start
    assert start.model == llama2.name
    assert start.options["max_model_len"] == 256
    assert start.versions.keys() == {"vllm", "torch", "plugin"}
    assert start.machine["cores"]
    assert start.path is not None
    assert [path.stat().st_mode & 0o777 for path in (start.path.parent, start.path)] == [0o700, 0o600]


def test_the_table_in_the_log_is_compared_with_the_start_before(cold: Served, warm: Served) -> None:
    assert "before" not in next(line for line in cold.log.splitlines() if " phase " in line)
    assert "change" in next(line for line in warm.log.splitlines() if " phase " in line)
    assert cold.start.id in warm.log
    for served in (cold, warm):
        assert served.log.count(f"(vllm-compile-ext report {served.start.id})") == 1
        for row in phases.breakdown(served.start).rows:
            if row.seconds > 0.1:
                assert any(row.phase in line and f"{row.seconds:.2f}" in line for line in served.log.splitlines())


def test_each_span_is_exported_once(served: Served) -> None:
    start = served.start
    mine = [span for span in served.received if span.trace == start.trace and span.name != "llm_request"]
    assert max(Counter(span.id for span in mine).values()) == 1
    exported = {span.id: (span.name, span.parent or None, span.start, span.end) for span in mine}
    kept = {span.id: (span.name, span.parent, span.start, span.end) for span in start.spans}
    assert exported.items() <= kept.items()
    helpers = {one.pid for one in start.processes if one.kind == "helper"}
    assert [span.name for span in start.spans if span.id not in exported and span.pid not in helpers] == []


def test_an_orchestrators_trace_goes_on(cold: Served, warm: Served) -> None:
    assert (cold.start.trace, cold.start.parent, recorded.root(cold.start).parent) == (TRACE, PARENT, PARENT)
    assert (warm.start.parent, recorded.root(warm.start).parent) == (None, None)
    assert warm.start.trace != TRACE


def test_vllms_traces_of_requests_are_as_without_the_plugin(cold: Served, warm: Served) -> None:
    """Those without a header of their own are part of TRACEPARENT's trace, as in stock vLLM, and not of the start."""
    requests = [span for span in cold.received if span.name == "llm_request"]
    assert len(requests) == 3
    assert {(span.trace, span.parent) for span in requests} == {(TRACE, PARENT)}
    kinds = {span.resource["vllm.instrumenting_module_name"] for span in cold.received}
    assert kinds >= {"vllm.llm_engine", "vllm.engine_core", "vllm.worker"}
    assert not [span for span in warm.received if span.name == "llm_request"], "vLLM was not asked for those"
