"""What is recorded of real starts: `vllm serve` cold and warm, two ranks, one process, and starts that die."""

from __future__ import annotations

import os
import shutil
import signal
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import process
from tests.served import ENGINE, MANY, PARENT, PTH, TRACE, Served, recorded
from vllm_compile_ext.record import phases, read
from vllm_compile_ext.record.read import Start

pytestmark = pytest.mark.engine

# Where the environment has it, every process does.
INSTALLED = (Path(sysconfig.get_paths()["purelib"]) / PTH.name).exists()


@pytest.fixture
def cold(cold_server: Served) -> Served:
    return cold_server


@pytest.fixture
def warm(warm_server: Served) -> Served:
    return warm_server


@pytest.fixture(params=["cold", "warm"])
def served(request: pytest.FixtureRequest) -> Served:
    found: Served = request.getfixturevalue(request.param)
    return found


def root(start: Start) -> read.Span:
    (found,) = [span for span in start.spans if span.parent is None or span.parent == start.parent]
    return found


def test_one_connected_trace(served: Served) -> None:
    start = served.start
    known = {span.id for span in start.spans}
    assert root(start).name == "start"
    assert [span.name for span in start.spans if span.parent not in known] == ["start"]
    assert [span.name for span in start.spans if span.end is None] == []
    kinds = Counter(one.kind for one in start.processes)
    assert (kinds["front end"], kinds["engine core"], kinds["worker"]) == (1, 1, 1)
    assert start.skipped == 0


def test_the_root_spans_the_wall_time(served: Served) -> None:
    span = root(served.start)
    measured = served.answered - served.began
    assert span.end is not None
    assert span.end - span.start == pytest.approx(measured, rel=0.02)
    assert span.start == pytest.approx(served.began, abs=0.02 * measured)
    assert span.end == served.start.first_token


def test_nearly_all_the_time_is_inside_named_phases(served: Served) -> None:
    start = served.start
    assert phases.breakdown(start).coverage >= 0.95
    assert phases.breakdown(start, end=start.first_token).coverage >= 0.95


def test_every_phase_of_a_server_is_there(cold: Served, warm: Served) -> None:
    common = {"imports", "config", "plugin", "spawn", "model construction", "weights", "kv cache", "api server"}
    for served, more in ((cold, {"interpreter", "compile"}), (warm, {"load compiled code"})):
        found = {span.phase for span in served.start.spans}
        assert common | more | {"first request", "distributed", "warm-up", "memory profiling"} <= found
    assert ("interpreter" in {span.phase for span in warm.start.spans}) == INSTALLED


def test_heavy_imports_are_told_apart_where_the_pth_file_is_installed(cold: Served, warm: Served) -> None:
    for pid in {one.pid for one in cold.start.processes}:
        names = {span.name for span in cold.start.spans if span.pid == pid}
        assert {"import vllm", "import torch", "import transformers"} <= names
    assert ("import torch" in {span.name for span in warm.start.spans}) == INSTALLED
    assert [span.name for span in warm.start.spans].count("imports") >= 3


def test_vllms_spans_and_ours_are_in_each_other(cold: Served) -> None:
    spans = {span.id: span for span in cold.start.spans}

    def above(name: str) -> list[str]:
        at, path = next(span for span in cold.start.spans if span.name == name), []
        while at.parent in spans:
            at = spans[at.parent]
            path.append(at.name)
        return path

    assert "worker 0" in above("Load weights")
    path = above("piece 0")
    ours = ["trace", "compile", "Warmup (CPU)", "memory profiling", "worker 0"]
    assert path[: len(ours)] == ours
    assert path[-2:] == ["engine client", "start"]
    assert "EngineCore" in path


def test_what_was_compiled_and_loaded_is_noted(cold: Served, warm: Served) -> None:
    def notes(served: Served) -> dict[str, dict[str, object]]:
        return {note.name: note.attrs for note in served.start.notes}

    assert {"key", "miss", "compiled", "kept"} <= notes(cold).keys()
    assert notes(cold)["miss"]["why"] == "cache miss: nothing is stored yet"
    assert notes(cold)["compiled"]["distinct"] == 3
    assert notes(warm).keys() == {"key", "loaded"}
    assert notes(warm)["loaded"]["key"] == notes(cold)["kept"]["key"]
    assert notes(warm)["loaded"]["seconds"] > 0
    assert (cold.start.temperature, warm.start.temperature) == ("cold", "warm")


def test_the_first_line_says_what_was_started(cold: Served, llama2: Path) -> None:
    start = cold.start
    assert start.model == llama2.name
    assert start.options["max_model_len"] == 256
    assert start.versions.keys() == {"vllm", "torch", "plugin"}
    assert start.machine["cores"]
    assert start.path is not None
    assert start.path.parent.stat().st_mode & 0o777 == 0o700
    assert start.path.stat().st_mode & 0o777 == 0o600


def test_the_table_in_the_log_is_compared_with_the_start_before(cold: Served, warm: Served) -> None:
    for served in (cold, warm):
        assert f"vllm-compile-ext report {served.start.id}" in served.log
    assert "before" not in next(line for line in cold.log.splitlines() if " phase " in line)
    assert "change" in next(line for line in warm.log.splitlines() if " phase " in line)
    assert cold.start.id in warm.log
    for served in (cold, warm):
        for row in phases.breakdown(served.start).rows:
            if row.seconds > 0.1:
                assert any(row.phase in line and f"{row.seconds:.2f}" in line for line in served.log.splitlines())


def test_phases_are_at_metrics(warm: Served) -> None:
    assert 'vllm_compile_ext_startup_seconds{phase="load compiled code"}' in warm.metrics


def test_each_span_is_exported_once(served: Served) -> None:
    mine = [span for span in served.received if span.trace == served.start.trace and span.name != "llm_request"]
    assert max(Counter(span.id for span in mine).values()) == 1
    recorded = {span.id: span for span in served.start.spans}
    helpers = {one.pid for one in served.start.processes if one.kind == "helper"}
    exported = {span.id: span for span in mine}
    assert exported.keys() <= recorded.keys()
    missing = [span for key, span in recorded.items() if key not in exported and span.pid not in helpers]
    assert [span.name for span in missing] == []
    for key, span in exported.items():
        assert (span.name, span.parent or None) == (recorded[key].name, recorded[key].parent)
        assert (span.start, span.end) == (recorded[key].start, recorded[key].end)


def test_an_orchestrators_trace_goes_on(cold: Served, warm: Served) -> None:
    assert (cold.start.trace, cold.start.parent) == (TRACE, PARENT)
    assert root(cold.start).parent == PARENT
    assert (warm.start.parent, root(warm.start).parent) == (None, None)
    assert warm.start.trace != TRACE


def test_vllms_traces_of_requests_are_as_without_the_plugin(cold: Served, warm: Served) -> None:
    """Those without a header of their own are part of TRACEPARENT's trace, as in stock vLLM, and not of the start."""
    requests = [span for span in cold.received if span.name == "llm_request"]
    assert len(requests) == 3
    assert {(span.trace, span.parent) for span in requests} == {(TRACE, PARENT)}
    kinds = {span.resource["vllm.instrumenting_module_name"] for span in cold.received}
    assert kinds >= {"vllm.llm_engine", "vllm.engine_core", "vllm.worker"}
    assert not [span for span in warm.received if span.name == "llm_request"], "vLLM was not asked for those"


def test_two_ranks(cold_ranks: tuple[process.Outcome, Path]) -> None:
    outcome, cache = cold_ranks
    assert outcome.value["env"] == [None, None]
    assert outcome.value["provider"] == "ProxyTracerProvider"
    start = min(recorded(cache), key=lambda start: start.time)
    known = {span.id for span in start.spans}
    assert [span.name for span in start.spans if span.parent not in known] == ["start"]
    workers = {one.rank: one.pid for one in start.processes if one.kind == "worker"}
    assert workers.keys() == {0, 1}
    for pid in workers.values():
        names = [span.name for span in start.spans if span.pid == pid]
        for name in ("distributed init", "Load weights", "compile", "Allocate KV cache"):
            assert names.count(name) == 1
    assert phases.breakdown(start, end=start.first_token).coverage >= 0.95
    assert root(start).end == start.first_token


TWICE = """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    limits = dict(max_num_batched_tokens=256, max_model_len=256, gpu_memory_utilization=0.4, dtype="float32")
    try:
        LLM(sys.argv[1], **limits)
    except Exception as error:
        report(type(error).__name__)
    cleanup_dist_env_and_memory()
    LLM(sys.argv[2], **limits).generate("x", SamplingParams(max_tokens=2), use_tqdm=False)
"""


@dataclass(frozen=True)
class Deaths:
    killed: Start
    failed: Start
    second: Start


@pytest.fixture(scope="module")
def deaths(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Deaths:
    """A worker that is killed, and meanwhile, in one process, an engine without its weights and one that comes up."""
    folder = tmp_path_factory.mktemp("deaths")
    broken = shutil.copytree(llama2, folder / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    roots = [folder / name for name in ("killed", "twice")]
    runs = [root / "run" for root in roots]
    options = '{"distributed_executor_backend": "mp"}'
    killed = process.start(ENGINE, runs[0], str(llama2), options, VLLM_CACHE_ROOT=str(roots[0]), **MANY)
    twice = process.start(TWICE, runs[1], str(broken), str(llama2), VLLM_CACHE_ROOT=str(roots[1]))
    while killed.poll() is None:
        found = [span for start in recorded(roots[0]) for span in start.spans if span.name == "piece 0"]
        if found:
            os.kill(found[0].pid, signal.SIGKILL)
            break
        time.sleep(0.1)
    outcome = process.finish(twice, runs[1])
    assert outcome.code == 0, outcome.output[-3000:]
    assert outcome.value == "SafetensorError"
    assert process.finish(killed, runs[0]).code != 0
    (start,) = recorded(roots[0])
    return Deaths(start, *sorted(recorded(roots[1]), key=lambda start: start.time))


def test_a_worker_that_is_killed_leaves_the_phase_it_died_in(deaths: Deaths) -> None:
    death = phases.death(deaths.killed)
    assert death is not None
    assert death.process is not None
    assert (death.phase, death.process.kind) == ("compile", "worker")
    assert deaths.killed.ready is None


def test_an_error_while_weights_load_is_in_the_record(deaths: Deaths) -> None:
    start = deaths.failed
    death = phases.death(start)
    assert death is not None
    assert death.phase == "weights"
    assert death.error is not None
    assert "SafetensorError" in death.error
    assert [gone.error for gone in start.exits if gone.error]
    assert start.ready is None


def test_one_process_and_its_second_engine(deaths: Deaths) -> None:
    failed, start = deaths.failed, deaths.second
    assert [one.kind for one in start.processes if one.kind != "helper"] == ["front end"]
    assert start.begin > failed.last
    assert phases.breakdown(start, end=start.first_token).coverage >= 0.95
    assert {"compile", "weights", "first request"} <= {span.phase for span in start.spans}
    assert [span.name for span in start.spans if span.end is None] == []
    assert root(start).end == start.first_token
