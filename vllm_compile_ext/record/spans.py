"""What the rest of the plugin records of a start: `span` around work, `note` for facts.

Both cost a few comparisons where nothing is recorded, and neither ever raises.  No vLLM, torch or OpenTelemetry is
imported here.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vllm_compile_ext import harmless
from vllm_compile_ext.record import clock, recorder

if TYPE_CHECKING:
    from vllm_compile_ext.record.backend import Handle

logger = logging.getLogger(__name__)


class span:  # noqa: N801 - used like a function
    """``with span("read", phase="load compiled code", model=name) as it: ...``; ``it.set(bytes=...)`` adds attributes.

    phase: a row of the table, see `vllm_compile_ext.record.phases.PHASES`; of the span around it where there is none.
    """

    __slots__ = ("_attrs", "_context", "_handle", "_name")

    def __init__(self, name: str, phase: str | None = None, **attrs: Any) -> None:
        self._name, self._attrs = name, attrs if phase is None else {"phase": phase, **attrs}
        self._context: AbstractContextManager[Handle] | None = None
        self._handle: Handle | None = None

    def __enter__(self) -> span:
        to = recorder.active()
        if to is not None:
            try:
                self._context = to.backend.enter(self._name, self._attrs)
                self._handle = self._context.__enter__()
            except Exception as error:
                self._context = self._handle = None
                logger.debug("not recorded: %s: %s", self._name, error)
        return self

    def set(self, **attrs: Any) -> None:
        """Add attributes."""
        if self._handle is not None:
            try:
                self._handle.set(attrs)
            except Exception as error:
                logger.debug("not recorded: %s: %s", self._name, error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is None:
            return
        try:
            self._context.__exit__(kind, error, trace)
        except BaseException as raised:
            # What is raised in the block comes out of the context again, and goes on by itself.
            if raised is not error:
                logger.debug("not recorded: %s: %s", self._name, raised)


class stage(span):  # noqa: N801
    """A span in the life of the process, one at a time: what has no other span around it is part of it, in all threads,
    and so are processes that are started meanwhile.
    """

    __slots__ = ("_recorder",)

    def __enter__(self) -> stage:
        self._recorder = recorder.active()
        if self._recorder is not None:
            try:
                self._handle = self._recorder.enter(self._name, self._attrs)
            except Exception as error:
                logger.debug("not recorded: %s: %s", self._name, error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recorder is not None and self._handle is not None:
            try:
                self._recorder.leave(self._handle, harmless.error(error) or None)
            except Exception as raised:
                logger.debug("not recorded: %s: %s", self._name, raised)


def note(name: str, **attrs: Any) -> None:
    """A fact about what was compiled, loaded or captured: "key", "miss", "loaded", "compiled", "kept", ..."""
    to = recorder.active()
    if to is not None:
        try:
            to.line("note", t=clock.now(), pid=to.pid, name=name, attrs=attrs)
        except Exception as error:
            logger.debug("not recorded: %s: %s", name, error)
