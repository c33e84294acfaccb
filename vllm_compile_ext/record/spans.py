"""What the rest of the plugin records of a start: `span` and `stage` around work, `note` for facts.

They cost a comparison where nothing is recorded, and never raise.  No vLLM, torch or OpenTelemetry is imported here.
"""

from __future__ import annotations

import logging
import os
from contextvars import Token
from types import TracebackType
from typing import Any

from vllm_compile_ext import harmless
from vllm_compile_ext.record import recorder
from vllm_compile_ext.record.recorder import Recorder

logger = logging.getLogger(__name__)


class _Quiet:
    """``with quiet:`` around code that must not raise."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            logger.debug("not recorded: %s: %s", type(error).__name__, error)
        return isinstance(error, Exception)


quiet = _Quiet()


class span:  # noqa: N801 - used like a function
    """``with span("read", "load compiled code", model=name) as it: ...``; ``it.set(bytes=...)`` adds attributes.

    phase: one of `vllm_compile_ext.record.phases.PHASES`; the phase of the span around it where there is none.
    """

    __slots__ = ("_attrs", "_id", "_later", "_name", "_recorder", "_token")

    def __init__(self, name: str, phase: str | None = None, **attrs: Any) -> None:
        self._name, self._attrs = name, attrs if phase is None else {"phase": phase, **attrs}
        self._later: dict[str, Any] = {}
        self._recorder: Recorder | None = None
        self._id: str | None = None
        self._token: Token[tuple[str, str] | None] | None = None

    def __enter__(self) -> span:
        self._recorder = recorder.active()
        if self._recorder is not None:
            with quiet:
                self._open(self._recorder)
        return self

    def set(self, **attrs: Any) -> None:
        """Add attributes."""
        self._later |= attrs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recorder is not None and self._id is not None:
            with quiet:
                self._close(self._recorder, self._id, harmless.error(error) or None)

    def _open(self, to: Recorder) -> None:
        self._id = to.begin(self._name, self._attrs)
        self._token = recorder.open_span.set((to.trace, self._id))

    def _close(self, to: Recorder, span: str, error: str | None) -> None:
        if self._token is not None:
            recorder.open_span.reset(self._token)
        to.end(span, error, self._later)


class stage(span):  # noqa: N801
    """A span that is the parent of what has none, in all threads and in processes that are started meanwhile.

    One at a time in a process.  It is not in the context that asyncio's tasks take along: those that answer requests
    would be part of it for ever.
    """

    __slots__ = ()

    def _open(self, to: Recorder) -> None:
        self._id = to.begin_stage(self._name, self._attrs)

    def _close(self, to: Recorder, span: str, error: str | None) -> None:
        to.end_stage(span, error, self._later)


def note(name: str, /, **attrs: Any) -> None:
    """Record a fact about what was compiled, loaded or captured: "key", "miss", "loaded", "compiled", "kept", ..."""
    to = recorder.active()
    if to is not None:
        with quiet:
            to.line("note", t=recorder.now(), pid=os.getpid(), name=name, attrs=attrs)
