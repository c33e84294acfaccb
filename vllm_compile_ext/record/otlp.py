"""Sends the recorded spans of a start, of all its processes, to where OpenTelemetry's traces of this process go.

While a start is going on its file is the only place of its spans.  The front end reads them there when the server is
ready, and the rest when the start is over.  Spans keep their ids, times, parents and attributes; the provider's sampler
decides on the start as a whole.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from vllm_compile_ext.record import recorder
from vllm_compile_ext.record.read import Process, Span, Start

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

SCOPE = "vllm_compile_ext"
BATCH = 500  # spans between two flushes: a queue of 2048 drops what does not fit
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# As vLLM 0.32.0 names its processes in spans (`init_tracer` and `maybe_init_worker_tracer` in `vllm/tracing`).
_MODULES = {recorder.FRONT: "vllm.llm_engine", recorder.ENGINE: "vllm.engine_core", recorder.WORKER: "vllm.worker"}


class Replay:
    """Sends each span of one start once.  endpoint: the one that vLLM is told, which not every process passes on."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint
        self._sent: set[str] = set()
        self._own: TracerProvider | None = None

    def send(self, start: Start, *, over: bool) -> None:
        """Send the spans that have ended since the last call; those that never ended too when the start is over."""
        spans = [one for one in start.spans if one.id not in self._sent and (over or one.end is not None)]
        provider = self.provider() if spans else None
        if provider is None or not _is_sampled(provider, start):
            return
        processes = {process.pid: process for process in start.processes}
        for number, span in enumerate(spans, 1):
            provider._active_span_processor.on_end(_readable(span, processes[span.pid], start, provider))
            self._sent.add(span.id)
            if number % BATCH == 0 or number == len(spans):
                provider.force_flush()

    def provider(self) -> TracerProvider | None:
        """Where spans go: to the global provider, which vLLM or the program that it is part of has made, or to our own.

        None: nowhere.
        """
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            return None
        there = trace.get_tracer_provider()
        if isinstance(there, TracerProvider):
            return there
        if self._own is None and (exporter := self._exporter()) is not None:
            # Not shut down at exit, which comes before the last spans; each `send` flushes it.
            self._own = TracerProvider(shutdown_on_exit=False)
            self._own.add_span_processor(BatchSpanProcessor(exporter))
        return self._own

    def _exporter(self) -> Any:
        """vLLM's exporter to its endpoint, else one that reads its own from OpenTelemetry's variables.

        The launcher of several API servers is told the endpoint, and makes no provider for it.
        """
        tracing: Any = sys.modules.get("vllm.tracing.otel")
        if self._endpoint is not None and tracing is not None:
            return tracing.get_span_exporter(self._endpoint)
        off = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none"
        if off or not any(os.environ.get(name) for name in _ENDPOINTS):
            return None
        if next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "grpc").startswith("http"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

            return HttpExporter()
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()


def _is_sampled(provider: TracerProvider, start: Start) -> bool:
    from opentelemetry.sdk.trace.sampling import Decision
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    _, _, flags = recorder.traceparent() or ("", "", 1)
    parent = set_span_in_context(NonRecordingSpan(_context(start.trace, start.parent, flags))) if start.parent else None
    result = provider.sampler.should_sample(parent, int(start.trace, 16), "start")
    return result.decision is Decision.RECORD_AND_SAMPLE


def _context(trace: str, span: str, flags: int = 1) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(flags))


def _readable(span: Span, process: Process, start: Start, provider: TracerProvider) -> ReadableSpan:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace.status import Status, StatusCode

    about = {"vllm.instrumenting_module_name": _MODULES.get(process.kind, SCOPE), "vllm.process_id": str(process.pid)}
    if process.kind != recorder.FRONT:
        about |= {"vllm.process_kind": process.kind.replace(" ", "_"), "vllm.process_name": process.name}
    error = span.error or ("never ended" if span.end is None else None)
    return ReadableSpan(
        span.name,
        _context(start.trace, span.id),
        _context(start.trace, span.parent) if span.parent else None,
        provider.resource.merge(Resource(about)),
        # of the types that OpenTelemetry takes
        {k: v if isinstance(v, str | bool | int | float) else str(v) for k, v in span.attrs.items() if v is not None},
        status=Status(StatusCode.ERROR, error) if error else Status(),
        start_time=span.start,
        end_time=start.end(span),
        instrumentation_scope=InstrumentationScope(SCOPE),
    )
