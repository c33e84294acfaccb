"""Spans by OpenTelemetry's SDK, vLLM's own among them.

vLLM 0.32.0 makes its spans with the global provider (`vllm/tracing/otel.py`), which is a dummy until somebody sets one:
vLLM does, in every process, when it is told an OTLP endpoint.  Here that module gets a provider of ours instead, which
writes the start's file.  The global provider is left alone, for the program that vLLM may be part of; where there is a
real one, vLLM's spans and ours go there, and it tells us of them too.  Where vLLM itself is told an endpoint, its
exporter is added to our provider, and that becomes the global one.

This module imports the SDK, so it is imported after ``vllm.tracing.otel``, which has done so already (~40 ms).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from opentelemetry import trace as api
from opentelemetry.context import Context, attach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from vllm_compile_ext import harmless
from vllm_compile_ext.record import clock, recorder
from vllm_compile_ext.record.backend import Handle, Remote

if TYPE_CHECKING:
    from vllm_compile_ext.record.recorder import Recorder

logger = logging.getLogger(__name__)

SCOPE = "vllm_compile_ext"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_MODULES = {recorder.FRONT: "vllm.llm_engine", recorder.ENGINE: "vllm.engine_core", recorder.WORKER: "vllm.worker"}
_HELD = 5000  # spans, until it is known whether they are exported


class Ids(IdGenerator):
    """Ids that no seed changes.

    OpenTelemetry's own come from Python's `random`, which vLLM seeds in each worker with the same number (0.32.0,
    `v1/worker/cpu_worker.py`, `gpu_worker.py`): from then on the ranks would give their spans equal ids, and what draws
    random numbers would draw others than without spans.
    """

    def generate_span_id(self) -> int:
        return int.from_bytes(os.urandom(8)) or 1

    def generate_trace_id(self) -> int:
        return int.from_bytes(os.urandom(16)) or 1

    def is_trace_id_random(self) -> bool:
        return True


class ToFile(SpanProcessor):
    """Tells the recorder of the spans of the start's trace."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self._afterwards = threading.local()

    def _of(self, span: ReadableSpan) -> Recorder | None:
        """Who wants to know of `span`: not of requests, which may be in an orchestrator's trace as well."""
        to, context = self.recorder, span.get_span_context()
        if to is None or to.over or context is None or span.kind is SpanKind.SERVER or not _ours(to, context):
            return None
        return to

    @contextlib.contextmanager
    def afterwards(self) -> Iterator[None]:
        """A span that begins in here is told of when it ends."""
        self._afterwards.on = True
        try:
            yield
        finally:
            self._afterwards.on = False

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        try:
            self._began(span)
        except Exception as error:  # it would come out of vLLM's function
            logger.debug("not recorded: %s: %s", span.name, error)

    def on_end(self, span: ReadableSpan) -> None:
        try:
            self._ended(span)
        except Exception as error:
            logger.debug("not recorded: %s: %s", span.name, error)

    def _began(self, span: Span) -> None:
        context = span.get_span_context()
        to = self._of(span)
        if to is None or context is None or getattr(self._afterwards, "on", False):
            return
        around = format(span.parent.span_id, "016x") if span.parent is not None else None
        to.began(format(context.span_id, "016x"), around, span.name, span.start_time or clock.now(), _attributes(span))

    def _ended(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        to = self._of(span)
        if to is None or context is None:
            return
        key, end = format(context.span_id, "016x"), span.end_time or clock.now()
        if getattr(self._afterwards, "on", False):
            around = format(span.parent.span_id, "016x") if span.parent is not None else None
            to.was(key, around, span.name, span.start_time or end, end, _attributes(span))
        else:
            error = None
            if span.status.status_code is StatusCode.ERROR:
                error = _error(span)
            to.ended(key, end, _attributes(span), error)


class Exports(SpanProcessor):
    """Stands for the exporter until it is known whether there is one: keeps what has ended."""

    def __init__(self) -> None:
        self._held: list[ReadableSpan] = []
        self._decided = False
        self._to: SpanProcessor | None = None
        self._lock = threading.Lock()

    @property
    def decided(self) -> bool:
        return self._decided

    @property
    def wanted(self) -> bool:
        return self._to is not None

    def decide(self, to: SpanProcessor | None) -> None:
        """Spans go `to` this one, from the first on; None: nowhere."""
        with self._lock:
            if self._to is not None:
                return
            self._decided, self._to = True, to
            held, self._held = self._held, []
        if to is not None:
            for span in held:
                to.on_end(span)

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            if not self._decided:
                if len(self._held) < _HELD:
                    self._held.append(span)
                return
        if self._to is not None:
            self._to.on_end(span)

    def shutdown(self) -> None:
        if self._to is not None:
            self._to.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._to is None or self._to.force_flush(timeout_millis)


class Sampler(sampling.Sampler):
    """The user's sampler decides what is exported; while a start is recorded, the rest is made too, for the file."""

    def __init__(self, file: ToFile, exports: Exports) -> None:
        self._inner = sampling._get_from_env_or_default()
        self._file, self._exports = file, exports

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: Any = None,
        attributes: Any = None,
        links: Sequence[Any] | None = None,
        trace_state: Any = None,
    ) -> sampling.SamplingResult:
        to = self._file.recorder
        recording = not self._exports.decided or (to is not None and not to.over)
        if not recording and not self._exports.wanted:
            return sampling.SamplingResult(sampling.Decision.DROP)
        found = self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        if found.decision is sampling.Decision.DROP and recording:
            return sampling.SamplingResult(sampling.Decision.RECORD_ONLY, attributes, found.trace_state)
        return found

    def get_description(self) -> str:
        return f"{SCOPE}({self._inner.get_description()})"


class Provider(TracerProvider):
    """Ours.  vLLM, asked for an exporter, adds it as it would to a provider of its own; a second one is not needed."""

    def __init__(self, file: ToFile) -> None:
        self.exports = Exports()
        self.offered = False  # vLLM is about to add its exporter
        kind, name, _ = recorder.kind()
        about = {"vllm.instrumenting_module_name": _MODULES.get(kind, SCOPE), "vllm.process_id": str(os.getpid())}
        if kind != recorder.FRONT:
            about |= {"vllm.process_kind": kind.replace(" ", "_"), "vllm.process_name": name}
        super().__init__(sampler=Sampler(file, self.exports), resource=Resource.create(about), id_generator=Ids())
        super().add_span_processor(file)
        super().add_span_processor(self.exports)

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        if not self.offered:
            super().add_span_processor(span_processor)
            return
        self.offered = False
        if self.exports.wanted:
            span_processor.shutdown()
        else:
            self.exports.decide(span_processor)


class OtelHandle:
    """See `vllm_compile_ext.record.backend.Handle`."""

    def __init__(self, span: Any, start: int) -> None:
        self.span, self.start = span, start
        context: SpanContext = span.get_span_context()
        self.trace, self.id = format(context.trace_id, "032x"), format(context.span_id, "016x")
        self.traceparent = f"00-{self.trace}-{self.id}-{context.trace_flags:02x}"

    def set(self, attrs: dict[str, Any]) -> None:
        self.span.set_attributes(_valid(attrs))

    def end(self, time: int | None = None, error: str | None = None) -> None:
        if not self.span.is_recording():
            return
        if error is not None:
            self.span.set_status(Status(StatusCode.ERROR, error))
        self.span.end(time or clock.now())


class Otel:
    """See `vllm_compile_ext.record.backend.Backend`."""

    def __init__(self, tracing: ModuleType) -> None:
        self.tracing = tracing
        self.file = ToFile()
        self.provider = Provider(self.file)
        self._told: list[Any] = []  # providers of others that tell us

    def bind(self, recorder: Recorder) -> None:
        self.recorder = self.file.recorder = recorder

    def in_use(self) -> TracerProvider:
        """Where vLLM's spans go: the program's own provider where it has set one, or ours."""
        there = api.get_tracer_provider()
        if there is self.provider or not isinstance(there, TracerProvider):
            return self.provider
        if not any(there is one for one in self._told):
            self._told.append(there)
            there.add_span_processor(self.file)
            if type(there.id_generator) is RandomIdGenerator:
                there.id_generator = Ids()  # type: ignore[assignment]
        return there

    def _tracer(self) -> api.Tracer:
        return self.in_use().get_tracer(SCOPE)

    def begin(self, name: str, parent: Handle | Remote | None, start: int, attrs: dict[str, Any]) -> OtelHandle:
        # What is not of this trace is not told to the recorder, and that knows its trace by its first span.
        span = self._tracer().start_span(name, _context(parent), attributes=_valid(attrs), start_time=start)
        return OtelHandle(span, start)

    def was(self, name: str, parent: Handle | Remote | None, start: int, end: int, attrs: dict[str, Any]) -> OtelHandle:
        with self.file.afterwards():
            handle = self.begin(name, parent, start, attrs)
            handle.end(end)
        return handle

    @contextlib.contextmanager
    def enter(self, name: str, attrs: dict[str, Any]) -> Iterator[OtelHandle]:
        around = None if self.current() is not None else _context(self.recorder.stage)
        # What the SDK would note of an exception by itself is its message and the lines of the stack.
        own: Any = {"record_exception": False, "set_status_on_exception": False}
        with self._tracer().start_as_current_span(name, around, attributes=_valid(attrs), **own) as span:
            try:
                yield OtelHandle(span, clock.now())
            except BaseException as error:
                span.set_status(Status(StatusCode.ERROR, harmless.error(error)))
                raise

    def current(self) -> OtelHandle | None:
        span = api.get_current_span()
        context = span.get_span_context()
        known = span.is_recording() and _ours(self.recorder, context)
        return OtelHandle(span, getattr(span, "start_time", 0) or 0) if known else None

    def attach(self) -> None:
        """Let what follows in this thread be part of the process's span, where it is not of another one."""
        if self.current() is None and isinstance(self.recorder.process, OtelHandle):
            attach(api.set_span_in_context(self.recorder.process.span))

    def export(self) -> None:
        """Export to where OpenTelemetry's own variables say, unless vLLM has seen to it or they say nothing."""
        if self.provider.exports.wanted:
            return
        named = self.in_use() is self.provider and any(os.environ.get(name) for name in _ENDPOINTS)
        off = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none"
        self.provider.exports.decide(BatchSpanProcessor(self._exporter()) if named and not off else None)

    def _exporter(self) -> Any:
        protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "grpc")
        exporter = self.tracing.OTLPHttpExporter if protocol.startswith("http") else self.tracing.OTLPGrpcExporter
        return exporter()


class _Api:
    """`opentelemetry.trace` for ``vllm.tracing.otel``."""

    def __init__(self, backend: Otel) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(api, name)

    def get_tracer(self, *args: Any, **kwargs: Any) -> api.Tracer:
        return self._backend.in_use().get_tracer(*args, **kwargs)


_installed: Otel | None = None
_before: dict[str, Any] = {}


def install(tracing: ModuleType) -> Otel:
    """Let vLLM's spans go to our provider; twice is the same as once."""
    global _installed
    if _installed is None:
        backend = Otel(tracing)

        def provider(*args: Any, **kwargs: Any) -> TracerProvider:
            backend.provider.offered = True
            return backend.provider

        ours: dict[str, Any] = {"trace": _Api(backend), "TracerProvider": provider}
        _before.update({name: getattr(tracing, name) for name in ours})
        vars(tracing).update(ours)
        _installed = backend
    return _installed


def uninstall() -> None:
    """Undo `install`; a provider that vLLM has made the global one stays."""
    global _installed
    if _installed is not None:
        vars(_installed.tracing).update(_before)
        _installed = None


def _ours(to: Recorder, context: SpanContext) -> bool:
    process = getattr(to, "process", None)
    return process is None or format(context.trace_id, "032x") == process.trace


def _context(parent: Handle | Remote | None) -> Context | None:
    if parent is None:
        return Context()
    if isinstance(parent, OtelHandle):
        return api.set_span_in_context(parent.span, Context())
    if isinstance(parent, tuple):
        trace, span, flags = parent
    else:
        trace, span, flags = parent.trace, parent.id, 1
    remote = SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(flags))
    return api.set_span_in_context(NonRecordingSpan(remote), Context())


def _valid(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of the types that OpenTelemetry takes."""
    return {k: v if isinstance(v, str | bool | int | float) else str(v) for k, v in attrs.items() if v is not None}


def _is_ours(span: ReadableSpan) -> bool:
    return span.instrumentation_scope is not None and span.instrumentation_scope.name == SCOPE


def _attributes(span: ReadableSpan) -> dict[str, Any]:
    """What the file keeps: not where in vLLM's source a span is made, of others' what is harmless."""
    kept = {k: v for k, v in (span.attributes or {}).items() if not k.startswith("code.")}
    return kept if _is_ours(span) else {k: v if harmless.is_harmless(v) else harmless.HIDDEN for k, v in kept.items()}


def _error(span: ReadableSpan) -> str:
    """Why a span failed: of others' the class of the exception alone, which the SDK writes before its message."""
    text = span.status.description or "error"
    kind = text.partition(":")[0]
    return text[:500] if _is_ours(span) else kind if kind.isidentifier() else "error"
