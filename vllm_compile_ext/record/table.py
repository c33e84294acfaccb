"""The table in the log when a start is ready: phase, seconds, share, and the model's previous start."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from vllm_compile_ext.record import phases, read

if TYPE_CHECKING:
    from vllm_compile_ext.record.recorder import Recorder

logger = logging.getLogger(__name__)


def say_soon(to: Recorder) -> None:
    """Log the table in a thread of its own: the server is to answer meanwhile."""
    log = to.log
    if log is not None:
        threading.Thread(target=_say, args=(log.path,), name="startup-table", daemon=True).start()


def _say(path: object) -> None:
    try:
        start = read.read(path)  # type: ignore[arg-type]
        _measure(start)
        logger.info("%s", text(start, read.previous(start)))
    except Exception as error:  # it is only told
        logger.debug("no table of this start: %s: %s", type(error).__name__, error)


def _measure(start: read.Start) -> None:
    """The phases at /metrics."""
    from vllm_compile_ext.record import metrics

    for row in phases.breakdown(start).rows:
        metrics.set("startup_seconds", row.seconds, phase=row.phase)


def text(start: read.Start, before: read.Start | None) -> str:
    """The table, of lines without trailing space."""
    now = phases.breakdown(start)
    old = phases.breakdown(before) if before is not None else None
    took = f"ready {now.seconds:.1f} s after the process began"
    versus = ""
    if before is not None and old is not None:
        versus = f"; {before.temperature} before ({before.id}): {old.seconds:.1f} s".replace(";  ", "; ")
    lines = [f"{took}{versus} (vllm-compile-ext report {start.id})"]
    earlier = {row.phase: row.seconds for row in old.rows} if old is not None else {}
    mine = {row.phase: row for row in now.rows}
    head = f"  {'phase':<20} {'seconds':>8} {'share':>6}"
    lines.append(head + (f" {'before':>8} {'change':>8}" if old is not None else ""))
    for phase in phases.ordered({**mine, **earlier}):
        row = mine.get(phase)
        seconds = row.seconds if row is not None else 0.0
        was = earlier.get(phase, 0.0)
        if max(seconds, was) < 0.005:
            continue
        line = f"  {phase:<20} {seconds:>8.2f} {row.share if row is not None else 0.0:>6.1%}"
        lines.append(line + (f" {was:>8.2f} {seconds - was:>+8.2f}" if old is not None else ""))
    return "\n".join(lines)
