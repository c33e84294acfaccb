"""One process's record of a start, without vLLM: its spans and vLLM's, when it is over, and what is exported."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from vllm_compile_ext import finder
from vllm_compile_ext.record import otlp, phases, read, recorder, vllm_spans
from vllm_compile_ext.record.events import event, span, stage
from vllm_compile_ext.record.recorder import Recorder, now

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
HTTP = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}


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
    finder.remove()


def begin() -> Recorder:
    to = recorder.begin()
    assert to is not None
    return to


@pytest.fixture
def to(clean: None) -> Recorder:
    """A front end that records and has its file."""
    made = begin()
    assert made.open({"model": "m"})
    return made


@pytest.fixture
def vllm(to: Recorder) -> ModuleType:
    """Stands for ``vllm.tracing.otel``, in a process that records."""
    module = ModuleType("vllm.tracing.otel")
    vars(module).update(trace=vllm_spans.trace(api))
    return module


def recorded() -> read.Start:
    return read.read(read.recorded()[-1])


def by_name(start: read.Start) -> dict[str, read.Span]:
    return {one.name: one for one in start.spans}


def parents(start: read.Start) -> dict[str, str | None]:
    """Spans and what they are part of, by name."""
    names = {one.id: one.name for one in start.spans}
    return {one.name: names.get(one.parent or "") for one in start.spans}


def test_a_start_from_beginning_to_end(clean: None) -> None:
    to = begin()
    to.record_imports(now())
    with stage("engine configuration", "config"):
        to.open({"model": "m"})
    with stage("engine client", "api server"), span("weights", "weights", files=2) as later:
        later["bytes"] = 3
        death = phases.death(recorded())
        with span("inner"):
            event("key", key="k")
    assert death is not None
    assert death.phase == "weights", "what is written is there at once"
    to.begin_stage("api server", {"phase": "api server"})
    with stage("build app", "api server"):
        pass
    to.ready()
    to.request()
    to.first_token()
    with span("later"):
        event("later")
    start = recorded()
    spans = by_name(start)
    assert parents(start) == {
        "start": None,
        "imports": "start",
        "engine configuration": "start",
        "engine client": "start",
        "weights": "engine client",
        "inner": "weights",
        "api server": "start",
        "build app": "api server",
        "first request": "start",
    }
    assert spans["weights"].attrs == {"phase": "weights", "files": 2, "bytes": 3}
    assert [one.attrs for one in start.notes] == [{"line": "", "key": "k"}]
    assert None not in [one.end for one in start.spans]
    assert spans["start"].end == start.first_token
    assert start.begin == recorder.process_start()
    assert (start.model, start.skipped, start.trace) == ("m", 0, to.trace)
    (front,) = start.processes
    assert front.argv[-1] == "***"


def test_errors_are_recorded_without_their_message_and_go_on(to: Recorder, vllm: ModuleType) -> None:
    for kind, name in ((span, "a"), (stage, "b")):
        with pytest.raises(ValueError, match="s3cret"), kind(name, "weights"):
            raise ValueError("s3cret")
    about = {"path": "s3cret", "files": 2, "code.function": "f"}
    theirs = vllm.trace.get_tracer("vllm").start_as_current_span("theirs", context=None, attributes=about)
    with pytest.raises(ValueError, match="s3cret"), theirs:
        raise ValueError("s3cret")
    spans = by_name(recorded())
    for each in ("a", "b", "theirs"):
        expected = "ValueError in test_errors_are_recorded_without_their_message_and_go_on (test_record.py:"
        assert (spans[each].error or "").startswith(expected)
    assert spans["theirs"].attrs == {"path": "***", "files": 2}
    assert b"s3cret" not in read.recorded()[-1].read_bytes()


def test_the_command_line_is_recorded_with_the_options_that_vllm_has(
    clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["python", "/bin/vllm", "serve", "/a/m", "--an-option", "x", "--api-k", "x", "--max-model-len=8"]
    monkeypatch.setattr(sys, "orig_argv", line)

    @dataclass
    class AsyncEngineArgs:
        model: str = ""
        an_option: str = ""

    module = ModuleType("vllm.engine.arg_utils")
    vars(module)["AsyncEngineArgs"] = AsyncEngineArgs
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm_spans.begin(AsyncEngineArgs("/a/m", "x"))
    start = recorded()
    (front,) = start.processes
    shown = ["python", "vllm", "serve", "m", "--an-option", "***", "--api-k", "***", "--max-model-len=8"]
    assert list(front.argv) == shown
    assert (start.model, start.options) == ("m", {"an_option": "***"})


def test_a_process_that_makes_no_engine_leaves_nothing(clean: None) -> None:
    to = begin()
    to.record_imports(now())
    with span("config", "config"):
        pass
    to.stop()
    assert read.recorded() == []


@pytest.mark.parametrize("given", [SAMPLED, "", "00-0-0-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 100])
def test_an_orchestrators_trace_goes_on(clean: None, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TRACEPARENT", given)
    begin().open({})
    start = recorded()
    assert start.parent == by_name(start)["start"].parent == (PARENT if given == SAMPLED else None)
    assert (start.trace == TRACE) == (given == SAMPLED)


def test_a_child_joins(to: Recorder, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    to.record_imports(now())
    tracer = vllm.trace.get_tracer("vllm")
    with stage("engine client", "api server"):
        stage_down = os.environ[recorder.VARIABLE]
        with tracer.start_as_current_span("Executor init", context=None), span("not handed down"):
            given = os.environ[recorder.VARIABLE]
        assert os.environ[recorder.VARIABLE] == stage_down
    # Another process, as far as the record can tell.
    monkeypatch.setattr(recorder, "current", None)
    monkeypatch.setattr(recorder, "identify", lambda forked=False: recorder.Identity("worker", "VllmWorker-1", 1))
    pid, _, rest = given.partition(" ")
    monkeypatch.setenv(recorder.VARIABLE, f"{int(pid) + 1} {rest}")
    child = begin()
    child.record_imports(now())
    assert os.environ[recorder.VARIABLE].startswith(f"{os.getpid()} {to.trace} {child.process} ")
    with span("weights", "weights"):
        pass
    child.done()
    assert recorder.VARIABLE not in os.environ
    start = recorded()
    outer = {"worker 1": "Executor init", "Executor init": "engine client", "weights": "worker 1"}
    assert parents(start).items() >= outer.items()
    assert by_name(start)["worker 1"].end is not None
    assert start.processes[-1].rank == 1


def test_a_fork_records_as_itself(to: Recorder) -> None:
    with span("outer", "spawn"):
        pid = os.fork()
        if pid == 0:
            try:
                event("first")
                with span("in the fork", "weights"):
                    pass
                to.done()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    start = recorded()
    spans = by_name(start)
    assert [spans["in the fork"].pid, *(one.pid for one in start.notes)] == [pid, pid]
    assert parents(start) == {"start": None, "outer": "start", "helper": "outer", "in the fork": "helper"}
    assert spans["helper"].end is not None
    assert spans["start"].end is None, "the fork's end is not the start's"
    assert {process.pid for process in start.processes} == {os.getpid(), pid}


def test_what_is_started_after_ready_is_not_part_of_the_start(to: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEPARENT", SAMPLED)
    assert os.environ[recorder.VARIABLE].startswith(f"{os.getpid()} {to.trace} {to.process} ")
    to.ready()
    assert recorder.VARIABLE not in os.environ
    assert os.environ["TRACEPARENT"] == SAMPLED, "as vLLM finds it for its requests"


def test_a_second_engine_is_a_second_start(clean: None) -> None:
    to = begin()
    vllm_spans.begin(None)
    to.ready()
    vllm_spans.begin(None)
    with span("weights", "weights"):
        pass
    before, start = sorted(map(read.read, read.recorded()), key=lambda start: start.time)
    assert by_name(before)["start"].end == before.ready
    assert parents(start) == {"start": None, "weights": "start"}


def test_a_failed_start_ends_with_its_error(to: Recorder) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        vllm_spans.sync_engine(fail)()
    start = recorded()
    (error,) = [gone.error or "" for gone in start.exits]
    assert error.startswith("RuntimeError in test_a_failed_start_ends_with_its_error.<locals>.fail (test_record.py:")
    assert by_name(start)["start"].error == error
    assert to.over


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_recorder_or_with_a_broken_one_nothing_happens(
    clean: None, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    def line(*args: object, **kwargs: object) -> Any:
        raise RuntimeError("surprise")

    if broken:
        monkeypatch.setattr(begin(), "line", line)
    with span("a", "config") as later, stage("b", "config"):
        later["x"] = 1
        event("c")
    with pytest.raises(ValueError, match="mine"), span("a"):
        raise ValueError("mine")
    assert not read.recorded()


def test_seeds_do_not_change_ids_nor_ids_what_is_drawn(to: Recorder) -> None:
    drawn = []
    for _ in range(2):
        random.seed(0)
        with span("same"):
            drawn.append(random.random())
    assert len({one.id for one in recorded().spans if one.name == "same"}) == 2
    random.seed(0)
    assert drawn == [random.random()] * 2


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


# vLLM's own spans, and OpenTelemetry


def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What a global provider gets, as vLLM makes it for ``--otlp-traces-endpoint`` or a program for itself."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(api, "_TRACER_PROVIDER", provider)
    return exporter


def names(exporter: InMemorySpanExporter) -> list[str]:
    return [one.name for one in exporter.get_finished_spans()]


def test_vllms_spans_are_recorded_with_their_phase(to: Recorder, vllm: ModuleType) -> None:
    tracer = vllm.trace.get_tracer("vllm")
    with (
        span("memory profiling", "memory profiling"),
        tracer.start_as_current_span("Load weights", attributes={"x": 1}),
    ):
        pass
    late = tracer.start_span(name="Inductor compilation", context=None, start_time=to.began)
    late.set_attributes({"x": 2})
    late.end(end_time=to.began + 5)
    spans = by_name(recorded())
    assert spans["Load weights"].attrs == {"phase": "weights", "x": 1}
    assert spans["Load weights"].parent == spans["memory profiling"].id
    late = spans["Inductor compilation"]
    assert (late.attrs, late.end) == ({"phase": "compile", "x": 2}, to.began + 5)


def test_what_vllm_traces_of_requests_and_later_goes_where_stock_sends_it(
    to: Recorder, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = exported(monkeypatch)
    vllm.trace.get_tracer("vllm").start_span(name="llm_request", start_time=now(), kind=SpanKind.SERVER).end()
    to.done()
    with vllm.trace.get_tracer("vllm").start_as_current_span("Load weights"):
        pass
    assert names(exporter) == ["llm_request", "Load weights"]
    assert by_name(recorded()).keys() == {"start"}
    assert vllm.trace.get_current_span is api.get_current_span


def test_each_span_is_exported_once_as_it_was_recorded(to: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = exported(monkeypatch)
    with pytest.raises(ValueError, match="s3cret"), span("failed", "weights", files=2, names=["a"]):
        raise ValueError("s3cret")
    to.begin("never ended", {})
    replay = otlp.Replay()
    replay.send(recorded(), over=False)
    assert names(exporter) == ["failed"]
    to.done()
    replay.send(recorded(), over=True)
    replay.send(recorded(), over=True)
    found = {each.name: each for each in exporter.get_finished_spans()}
    assert sorted(names(exporter)) == ["failed", "never ended", "start"]
    for name, one in by_name(recorded()).items():
        each, process = found[name], found[name].resource.attributes
        assert each.context is not None
        assert (f"{each.context.trace_id:032x}", f"{each.context.span_id:016x}") == (to.trace, one.id)
        assert (f"{each.parent.span_id:016x}" if each.parent else None) == one.parent
        assert (each.start_time, each.end_time) == (one.start, one.end or recorded().last)
        assert process["vllm.process_id"] == str(os.getpid())
        assert process["vllm.instrumenting_module_name"] == "vllm.llm_engine"
        assert each.status.is_ok == (name == "start")
    assert found["failed"].attributes == {"phase": "weights", "files": 2, "names": "['a']"}
    assert not any("s3cret" in each.to_json() for each in found.values())


@pytest.mark.parametrize(
    ("env", "sent"),
    [
        ({}, True),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, False),
        ({"OTEL_SDK_DISABLED": "true"}, False),
        ({"TRACEPARENT": NOT_SAMPLED}, False),
        ({"TRACEPARENT": SAMPLED}, True),
    ],
)
def test_what_is_not_sampled_is_in_the_file_alone(
    clean: None, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], sent: bool
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    to = begin()
    to.open({})
    exporter = exported(monkeypatch)
    to.done()
    otlp.Replay().send(recorded(), over=True)
    assert names(exporter) == ["start"] * sent
    assert by_name(recorded()).keys() == {"start"}


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        ({}, None),
        (ENDPOINT, "grpc"),
        (HTTP, "http"),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, None),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_where_opentelemetrys_variables_send_it(
    clean: None, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], kind: str | None
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    replay = otlp.Replay()
    found = replay.provider()
    assert (found is None) == (kind is None)
    assert replay.provider() is found
    if kind is not None:
        assert f".{kind}." in type(replay._exporter()).__module__
    assert not isinstance(api.get_tracer_provider(), TracerProvider), "the global one is the program's"


def test_vllms_endpoint_goes_before_the_variables(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher of several API servers is told an endpoint, and makes no provider for it."""
    exporter, tracing = InMemorySpanExporter(), ModuleType("vllm.tracing.otel")
    vars(tracing)["get_span_exporter"] = {"http://host": exporter}.__getitem__
    monkeypatch.setitem(sys.modules, "vllm.tracing.otel", tracing)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    to = begin()
    to.open({})
    to.done()
    otlp.Replay("http://host").send(recorded(), over=True)
    assert names(exporter) == ["start"]
