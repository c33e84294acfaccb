"""What the rest of the plugin tells of a start: `event` of what happened, `span` and `stage` around work.

They cost a few microseconds where nothing is recorded, and never raise.  No vLLM, torch or OpenTelemetry is imported
here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from vllm_compile_ext import harmless
from vllm_compile_ext.record import metrics, recorder
from vllm_compile_ext.record.recorder import Recorder

logger = logging.getLogger(__name__)

# Event -> counter -> what is added to it: the fact of that name, or a number.
COUNTS: dict[str, dict[str, str | int]] = {
    "miss": {"store_misses_total": 1},
    "loaded": {
        "store_hits_total": 1,
        "store_load_seconds_total": "seconds",
        "store_loaded_bytes_total": "bytes",
        "pieces_loaded_total": "pieces",
    },
    "compiled": {
        "pieces_compiled_total": "compiled",
        "pieces_loaded_total": "loaded",
        "store_loaded_bytes_total": "loaded_bytes",
    },
    "kept": {"store_kept_bytes_total": "bytes"},
    "not kept": {"store_failures_total": 1},
    "refuted": {"copies_refuted_total": 1},
    "function compiled": {"functions_compiled_total": 1},
    "function loaded": {"functions_loaded_total": 1, "store_loaded_bytes_total": "bytes"},
    "captured": {"graph_capture_seconds_total": "seconds"},
    "function kept": {"store_kept_bytes_total": "bytes"},
}
# What an operator should look at; the rest is logged at level INFO.
WARNINGS = frozenset({"fallback", "graphs skipped", "not kept", "refuted"})


def event(name: str, line: str = "", /, *, level: int | None = None, **facts: Any) -> None:
    """Log `line`, count by `COUNTS`, and note both line and facts in the record of the start; never raises.

    line: a sentence for people, safe to print; without one nothing is logged.  level: of `logging`; by `WARNINGS` where
    it is None.  facts: what programs read of it, such as key, model, shard, bytes, seconds.
    """
    if line:
        logger.log(level or (logging.WARNING if name in WARNINGS else logging.INFO), "%s", line, stacklevel=2)
    for counter, amount in COUNTS.get(name, {}).items():
        metrics.inc(counter, facts.get(amount, 0) if isinstance(amount, str) else amount)
    attrs = {"line": line, **facts}
    quietly(lambda to: to.line("note", t=recorder.now(), pid=os.getpid(), name=name, attrs=attrs))


def span(name: str, phase: str | None = None, /, **attrs: Any) -> AbstractContextManager[dict[str, Any]]:
    """``with span("read", "load compiled code", model=name) as later: ...``; what is put into `later` are attributes.

    phase: one of `vllm_compile_ext.record.phases.PHASES`; the phase of the span around it where there is none.
    """
    return _around(Recorder.enter, Recorder.leave, name, attrs if phase is None else {"phase": phase, **attrs})


def stage(name: str, phase: str) -> AbstractContextManager[dict[str, Any]]:
    """A span that is the parent of what has none, in all threads and in processes that are started meanwhile.

    One at a time in a process.  It is not in the context that asyncio's tasks take along: those that answer requests
    would be part of it for ever.
    """
    return _around(Recorder.begin_stage, Recorder.end_stage, name, {"phase": phase})


@contextmanager
def _around(
    begin: Callable[[Recorder, str, dict[str, Any]], str],
    end: Callable[[Recorder, str, str | None, dict[str, Any]], None],
    name: str,
    attrs: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    to, begun, error = recorder.active(), "", ""
    later: dict[str, Any] = {}
    if to is not None:
        with quiet():
            begun = begin(to, name, attrs)
    try:
        yield later
    except BaseException as raised:
        error = harmless.error(raised)
        raise
    finally:
        if to is not None and begun:
            with quiet():
                end(to, begun, error or None, later)


@contextmanager
def quiet() -> Iterator[None]:
    """Around code that must not raise."""
    try:
        yield
    except Exception as error:
        logger.debug("not recorded: %s: %s", type(error).__name__, error)


def quietly(do: Callable[[Recorder], Any]) -> None:
    """Call `do` with the recorder of this process, while it records."""
    to = recorder.active()
    if to is not None:
        with quiet():
            do(to)
