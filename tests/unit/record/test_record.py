"""One process's record of a start, without vLLM: spans of our own and by OpenTelemetry, and when it is over."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vllm_compile_ext.record import backend, clock, hooks, imports, otel, phases, read, recorder
from vllm_compile_ext.record.recorder import Recorder
from vllm_compile_ext.record.spans import note, span, stage

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def tracing() -> ModuleType:
    """Stands for ``vllm.tracing.otel``."""
    module = ModuleType("vllm.tracing.otel")
    vars(module).update(trace=api, TracerProvider=TracerProvider, is_otel_available=lambda: True)
    return module


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that records nothing yet, in a cache root of its own."""
    for name in ("traceparent", "TRACEPARENT", recorder.VARIABLE, "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.setenv(name, "")  # so that it is put back even where it is unset
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(recorder, "current", None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/vllm", "serve", "m", "--api-key", "x1y2"])
    yield
    recorder.forget()
    otel.uninstall()
    if imports.observer is not None:
        imports.observer.remove()


Begin = Callable[[], Recorder]


@pytest.fixture(params=["plain", "otel"])
def begin(request: pytest.FixtureRequest, clean: None) -> Begin:
    def begin() -> Recorder:
        recorder.meet(tracing() if request.param == "otel" else None)
        to = recorder.active()
        assert to is not None
        assert isinstance(to.backend, backend.Plain if request.param == "plain" else otel.Otel)
        return to

    return begin


def recorded() -> read.Start:
    return read.read(read.recorded()[-1])


def by_name(start: read.Start) -> dict[str, read.Span]:
    return {one.name: one for one in start.spans}


def test_a_start_from_beginning_to_end(begin: Begin) -> None:
    to = begin()
    to.settle(clock.now())
    with stage("engine configuration", "config"):
        to.open({"model": "m"})
    with stage("engine client", "api server"), span("weights", "weights", files=2) as it:
        it.set(bytes=3)
        with span("inner"):
            note("key", key="k")
    to.serving()
    with stage("build app", "api server"):
        pass
    to.ready()
    to.request()
    to.first_token()
    with span("later"):
        note("later")
    start = recorded()
    spans = by_name(start)
    assert spans.keys() == {
        *("start", "imports", "engine configuration", "engine client", "weights", "inner", "api server", "build app"),
        "first request",
    }
    assert spans["start"].parent is None
    for inner, outer in (
        ("engine client", "start"),
        ("weights", "engine client"),
        ("inner", "weights"),
        ("build app", "api server"),
        ("first request", "start"),
    ):
        assert spans[inner].parent == spans[outer].id
    assert spans["weights"].attrs == {"phase": "weights", "files": 2, "bytes": 3}
    assert [one.attrs for one in start.notes] == [{"key": "k"}]
    assert None not in [one.end for one in start.spans]
    assert spans["start"].end == start.first_token
    assert start.begin == clock.process_start()
    assert (start.model, start.skipped, start.trace) == ("m", 0, to.trace)
    (front,) = start.processes
    assert front.argv[-1] == "***"


def test_what_is_written_is_there_at_once(begin: Begin) -> None:
    to = begin()
    to.open({})
    with span("weights", "weights"):
        death = phases.death(recorded())
        assert death is not None
        assert death.phase == "weights"


def test_errors_are_recorded_and_go_on(begin: Begin) -> None:
    to = begin()
    to.open({})
    for kind, name in ((span, "a"), (stage, "b")):
        with pytest.raises(ValueError, match="no"), kind(name, "weights"):
            raise ValueError("no")
    spans = by_name(recorded())
    for each in (spans["a"].error, spans["b"].error):
        assert (each or "").startswith("ValueError in test_errors_are_recorded_and_go_on (test_record.py:")


def test_of_an_exception_its_message_is_neither_recorded_nor_exported(clean: None) -> None:
    recorder.meet(tracing())
    to = recorder.active()
    assert to is not None
    assert isinstance(to.backend, otel.Otel)
    exporter = InMemorySpanExporter()
    TracerProvider.add_span_processor(to.backend.provider, SimpleSpanProcessor(exporter))
    to.open({})
    with pytest.raises(ValueError, match="s3cret"), span("ours", "weights"):
        raise ValueError("s3cret")
    about = {"path": "s3cret", "files": 2, "code.function": "f"}
    theirs = to.backend.in_use().get_tracer("vllm").start_as_current_span("theirs", attributes=about)
    with pytest.raises(ValueError, match="s3cret"), span("around", "weights"), theirs:
        raise ValueError("s3cret")
    spans = by_name(recorded())
    assert (spans["theirs"].error, spans["theirs"].attrs) == ("ValueError", {"path": "***", "files": 2})
    assert b"s3cret" not in read.recorded()[-1].read_bytes()
    exported = {each.name: each.to_json() for each in exporter.get_finished_spans()}
    assert {"ours", "around", "theirs"} <= exported.keys()
    assert [name for name, text in exported.items() if "s3cret" in text] == ["theirs"], "vLLM's own are vLLM's to say"


def test_the_command_line_is_recorded_with_the_options_that_vllm_has(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["python", "/bin/vllm", "serve", "/a/m", "--an-option", "x", "--api-k", "x", "--max-model-len=8"]
    monkeypatch.setattr(sys, "orig_argv", line)

    @dataclass
    class AsyncEngineArgs:
        model: str = ""
        an_option: str = ""

    to = begin()
    module = ModuleType("vllm.engine.arg_utils")
    vars(module)["AsyncEngineArgs"] = AsyncEngineArgs
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hooks.begin(AsyncEngineArgs("/a/m", "x"))
    assert to.log is not None
    start = recorded()
    (front,) = start.processes
    shown = ["python", "vllm", "serve", "m", "--an-option", "***", "--api-k", "***", "--max-model-len=8"]
    assert list(front.argv) == shown
    assert (start.model, start.options) == ("m", {"an_option": "***"})


def test_a_process_that_makes_no_engine_leaves_nothing(begin: Begin) -> None:
    to = begin()
    to.settle(clock.now())
    with span("config", "config"):
        pass
    to.stop()
    assert read.recorded() == []


def test_an_orchestrators_trace_goes_on(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-{PARENT}-01")
    to = begin()
    to.open({})
    start = recorded()
    assert (start.trace, start.parent) == (TRACE, PARENT)
    assert by_name(start)["start"].parent == PARENT


@pytest.mark.parametrize("bad", ["", "00-0-0-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 100])
def test_a_context_that_is_none_begins_a_trace(begin: Begin, monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("TRACEPARENT", bad)
    to = begin()
    to.open({})
    assert by_name(recorded())["start"].parent is None


def test_a_child_joins(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begin()
    first.settle(clock.now())
    with stage("engine client", "api server"):
        first.open({})
        inherited = {name: os.environ[name] for name in ("traceparent", recorder.VARIABLE)}
    # Another process, as far as the record can tell.
    monkeypatch.setattr(recorder, "current", None)
    monkeypatch.setattr(recorder, "kind", lambda forked=False: ("worker", "VllmWorker-1", 1))
    pid, _, path = inherited[recorder.VARIABLE].partition(" ")
    for name, value in (inherited | {recorder.VARIABLE: f"{int(pid) + 1} {path}"}).items():
        monkeypatch.setenv(name, value)
    child = begin()
    child.settle(clock.now())
    child.join()
    with span("weights", "weights"):
        pass
    child.done()
    assert [os.environ.get(name) for name in ("traceparent", recorder.VARIABLE)] == [None, None]
    spans = by_name(recorded())
    assert spans["worker 1"].parent == spans["engine client"].id
    assert spans["weights"].parent == spans["worker 1"].id
    assert spans["worker 1"].end is not None
    assert recorded().processes[-1].rank == 1


def test_a_fork_records_as_itself(begin: Begin) -> None:
    to = begin()
    to.open({})
    with span("outer", "spawn"):
        pid = os.fork()
        if pid == 0:
            try:
                with span("in the fork", "weights"):
                    pass
                to.done()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    start = recorded()
    spans = by_name(start)
    assert spans["in the fork"].pid == pid
    assert spans["helper"].parent == spans["outer"].id
    assert spans["helper"].end is not None
    assert spans["start"].end is None, "the fork's end is not the start's"
    assert {process.pid for process in start.processes} == {os.getpid(), pid}


def test_the_environment_is_put_back_when_ready(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("traceparent", f"00-{TRACE}-{PARENT}-01")
    to = begin()
    to.settle(clock.now())
    to.open({})
    assert os.environ[recorder.CONTEXT] == to.process.traceparent
    assert os.environ[recorder.VARIABLE].startswith(f"{os.getpid()} ")
    to.ready()
    assert os.environ[recorder.CONTEXT] == f"00-{TRACE}-{PARENT}-01"
    assert recorder.VARIABLE not in os.environ


def test_a_second_engine_is_a_second_start(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    to = begin()
    module = tracing() if isinstance(to.backend, otel.Otel) else None
    monkeypatch.setitem(sys.modules, "vllm.tracing.otel", module)
    hooks.begin(None)
    to.backend.export()
    to.ready()
    hooks.begin(None)
    with span("weights", "weights"):
        pass
    second = recorder.active()
    assert second is not None
    assert second is not to
    assert second.process.start > to.process.start
    before, now = sorted(map(read.read, read.recorded()), key=lambda start: start.time)
    assert by_name(before)["start"].end == before.ready
    assert by_name(now)["weights"].parent == by_name(now)["start"].id
    assert by_name(now)["weights"].attrs == {"phase": "weights"}


def test_a_failed_start_ends_with_its_error(begin: Begin) -> None:
    to = begin()
    to.open({})

    def fail() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        hooks._client("config")(fail)()
    start = recorded()
    (error,) = [gone.error or "" for gone in start.exits]
    assert error.startswith("RuntimeError in test_a_failed_start_ends_with_its_error.<locals>.fail (test_record.py:")
    assert by_name(start)["start"].error == error
    assert to.over


def test_nothing_is_recorded_without_a_start(clean: None) -> None:
    with span("a", "config") as it:
        it.set(b=1)
        note("c")
    with stage("d"):
        pass


def test_a_broken_backend_costs_nothing(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    to = begin()
    to.open({})

    def broken(*args: object, **kwargs: object) -> Any:
        raise RuntimeError("surprise")

    monkeypatch.setattr(to, "line", broken)
    monkeypatch.setattr(to.backend, "begin", broken)
    with span("a", "config") as it, stage("b"):
        it.set(x=1)
        note("c")
    with pytest.raises(ValueError, match="mine"), span("a"):
        raise ValueError("mine")


# OpenTelemetry


@pytest.fixture
def vllm(clean: None) -> ModuleType:
    """vLLM's module, with a start that is recorded."""
    module = tracing()
    recorder.meet(module)
    to = recorder.active()
    assert to is not None
    to.open({})
    return module


def test_vllms_spans_are_recorded_with_their_phase(vllm: ModuleType) -> None:
    tracer = vllm.trace.get_tracer("vllm")
    with (
        span("memory profiling", "memory profiling"),
        tracer.start_as_current_span("Load weights", attributes={"x": 1}),
    ):
        pass
    spans = by_name(recorded())
    assert spans["Load weights"].attrs == {"phase": "weights", "x": 1}
    assert spans["Load weights"].parent == spans["memory profiling"].id


def test_the_global_provider_is_left_to_the_program(vllm: ModuleType) -> None:
    vllm.trace.get_tracer("vllm")
    assert not isinstance(api.get_tracer_provider(), TracerProvider)
    assert vllm.trace.get_current_span is api.get_current_span


def init_as_vllm_does(vllm: ModuleType) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = vllm.TracerProvider(resource=None)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def names(exporter: InMemorySpanExporter) -> list[str]:
    found: tuple[ReadableSpan, ...] = exporter.get_finished_spans()
    return [one.name for one in found]


def test_what_ended_before_vllm_exports_is_exported_too_and_once(vllm: ModuleType) -> None:
    to = recorder.active()
    assert to is not None
    with span("early"):
        pass
    exporter = init_as_vllm_does(vllm)
    again = init_as_vllm_does(vllm)
    with vllm.trace.get_tracer("vllm").start_as_current_span("Load weights"):
        pass
    to.ready()
    to.request()
    to.first_token()
    with vllm.trace.get_tracer("vllm").start_as_current_span("llm_request"):
        pass
    assert names(exporter) == ["early", "Load weights", "first request", "start", "llm_request"]
    assert names(again) == []


def test_a_sampler_that_drops_drops_no_line(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    module = tracing()
    recorder.meet(module)
    to = recorder.active()
    assert to is not None
    to.open({})
    exporter = init_as_vllm_does(module)
    with span("a", "config"):
        pass
    assert by_name(recorded())["a"].attrs == {"phase": "config"}
    assert names(exporter) == []


def test_seeds_do_not_change_ids_nor_ids_what_is_drawn(vllm: ModuleType) -> None:
    drawn = []
    for _ in range(2):
        random.seed(0)
        with span("same"):
            drawn.append(random.random())
    assert len({one.id for one in recorded().spans if one.name == "same"}) == 2
    random.seed(0)
    assert drawn == [random.random()] * 2


def test_a_programs_own_provider_gets_vllms_spans_and_ours(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    own = TracerProvider()
    own.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(api, "_TRACER_PROVIDER", own)
    module = tracing()
    recorder.meet(module)
    to = recorder.active()
    assert to is not None
    to.open({})
    with span("a"), module.trace.get_tracer("vllm").start_as_current_span("Load weights"):
        pass
    with own.get_tracer("app").start_as_current_span("the program's"):
        pass
    assert names(exporter) == ["Load weights", "a", "the program's"]
    assert by_name(recorded()).keys() == {"start", "Load weights", "a"}


def test_without_opentelemetry_there_are_spans_of_our_own(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(backend.of(None), backend.Plain)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert isinstance(backend.of(tracing()), backend.Plain)


@pytest.mark.parametrize(
    ("argv", "yes"),
    [
        (["python", "-m", "vllm.entrypoints.openai.api_server"], True),
        (["python", "-X", "dev", "/usr/bin/vllm", "serve"], True),
        (["python", "-u", "script.py", "vllm"], False),
        (["python", "-c", "import vllm"], False),
    ],
)
def test_vllms_own_commands(monkeypatch: pytest.MonkeyPatch, argv: list[str], yes: bool) -> None:
    monkeypatch.setattr(sys, "orig_argv", argv)
    assert recorder.vllm_command() is yes
