"""Who makes spans: OpenTelemetry's SDK where vLLM has it, or else a few lines of our own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from vllm_compile_ext import harmless
from vllm_compile_ext.record import clock

if TYPE_CHECKING:
    from vllm_compile_ext.record.recorder import Recorder

Remote = tuple[str, str, int]  # trace, span and flags of a span of another process


class Handle(Protocol):
    """An open span.  trace, id: hexadecimal.  traceparent: as processes that it starts inherit it."""

    @property
    def trace(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def traceparent(self) -> str: ...

    def set(self, attrs: dict[str, Any]) -> None:
        """Add attributes."""

    def end(self, time: int | None = None, error: str | None = None) -> None:
        """End it; twice is the same as once."""


class Backend(Protocol):
    """Makes spans, and tells the recorder of each."""

    def bind(self, recorder: Recorder) -> None: ...

    def begin(self, name: str, parent: Handle | Remote | None, start: int, attrs: dict[str, Any]) -> Handle:
        """A span that nothing becomes part of by itself."""

    def was(self, name: str, parent: Handle | Remote | None, start: int, end: int, attrs: dict[str, Any]) -> Handle:
        """A span that is over."""

    def enter(self, name: str, attrs: dict[str, Any]) -> contextlib.AbstractContextManager[Handle]:
        """A span that what happens inside of it becomes part of."""

    def current(self) -> Handle | None:
        """The innermost span of `enter`, or of vLLM's, that is open here."""

    def attach(self) -> None:
        """What follows in a process that was started is part of the process's span."""

    def export(self) -> None:
        """Export to where OpenTelemetry's variables say."""


def of(tracing: ModuleType | None) -> Backend:
    """The backend for a process in which vLLM's module ``vllm.tracing.otel`` is `tracing`."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if tracing is None or disabled or not tracing.is_otel_available():
        return Plain()
    from vllm_compile_ext.record import otel

    return otel.install(tracing)


class _PlainHandle:
    def __init__(self, backend: Plain, trace: str, start: int) -> None:
        self._backend, self._over = backend, False
        self._attrs: dict[str, Any] = {}
        self.trace, self.id, self.start = trace, os.urandom(8).hex(), start
        self.traceparent = f"00-{trace}-{self.id}-01"

    def set(self, attrs: dict[str, Any]) -> None:
        self._attrs |= attrs

    def end(self, time: int | None = None, error: str | None = None) -> None:
        if not self._over:
            self._over = True
            self._backend.recorder.ended(self.id, time or clock.now(), self._attrs, error)


class Plain:
    """Spans for the file alone."""

    def __init__(self) -> None:
        self.recorder: Recorder
        self._current: ContextVar[_PlainHandle | None] = ContextVar("vllm_compile_ext_span", default=None)

    def bind(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def _new(self, parent: Handle | Remote | None, start: int) -> tuple[_PlainHandle, str | None]:
        if parent is None:
            return _PlainHandle(self, os.urandom(16).hex(), start), None
        trace, span = parent[:2] if isinstance(parent, tuple) else (parent.trace, parent.id)
        return _PlainHandle(self, trace, start), span

    def begin(self, name: str, parent: Handle | Remote | None, start: int, attrs: dict[str, Any]) -> Handle:
        handle, around = self._new(parent, start)
        self.recorder.began(handle.id, around, name, start, attrs)
        return handle

    def was(self, name: str, parent: Handle | Remote | None, start: int, end: int, attrs: dict[str, Any]) -> Handle:
        handle, around = self._new(parent, start)
        self.recorder.was(handle.id, around, name, start, end, attrs)
        return handle

    @contextlib.contextmanager
    def enter(self, name: str, attrs: dict[str, Any]) -> Iterator[Handle]:
        handle, around = self._new(self._current.get() or self.recorder.stage, clock.now())
        self.recorder.began(handle.id, around, name, handle.start, attrs)
        token = self._current.set(handle)
        error = None
        try:
            yield handle
        except BaseException as raised:
            error = harmless.error(raised)
            raise
        finally:
            self._current.reset(token)
            handle.end(error=error)

    def current(self) -> Handle | None:
        return self._current.get()

    def attach(self) -> None:
        pass

    def export(self) -> None:
        pass
