"""What the front end says of its start: what goes on while it lasts, a table when it is ready, and its spans by OTLP.

All of it is read from the file that the processes of the start write, in a thread of the process that made the file.
"""

from __future__ import annotations

import logging
import threading

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.record import bytecode, metrics, otlp, phases, read
from vllm_compile_ext.record.events import quiet
from vllm_compile_ext.record.read import OTHER, Start
from vllm_compile_ext.record.recorder import Recorder, now

logger = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two lines about a start that is not ready
LONGEST = 3600 * 10**9  # ns; a start that takes longer is none, such as the part of a server that has no front end
# Phases whose names say too little to who waits.
WORDS = {
    "config": "reading the configuration",
    "spawn": "importing in another process",  # until it has loaded the plugin
    "compile": "compiling",
    "weights": "loading weights",
    "graph capture": "capturing graphs",
    "load compiled code": "loading compiled code",
    "api server": "starting the server",
    OTHER: "something that no span names",
}


def watch(to: Recorder, endpoint: str | None = None) -> None:
    """Look at the start that `to` records in its file until it is over, in a thread.

    endpoint: where vLLM is told to send its traces.
    """
    to.watcher = threading.Thread(target=_watch, args=(to, endpoint), daemon=True, name="start-watcher")
    to.watcher.start()


def _watch(to: Recorder, endpoint: str | None) -> None:
    with quiet():
        progress, replay, said = settings.load().VLLM_COMPILE_PROGRESS, otlp.Replay(endpoint), False
        while to.file is not None:
            # With several API servers it is another process that gets ready, and its lines in the file say so.
            to.changed.wait(None if to.ready_at is not None else EVERY)
            to.changed.clear()
            over = to.over
            start = read.read(to.file.path)
            if start.ready is not None and not said:
                said = True
                _say_ready(start)
            if start.ready is not None or over:
                try:
                    replay.send(start, over=over)
                except Exception as error:
                    logger.warning("spans of this start were not exported: %s", harmless.error(error))
            elif now() - start.begin > LONGEST:
                return
            elif progress:
                logger.info("%s", progress_line(start, now()))
            if over:
                return
            if start.first_token is not None:
                to.done(start.first_token)


def _say_ready(start: Start) -> None:
    for row in phases.breakdown(start).rows:
        metrics.set("startup_seconds", row.seconds, phase=row.phase)
    logger.info("%s", table(start, read.previous(start)))
    if missing := bytecode.missing():
        logger.info("%s (%s)", missing, bytecode.WAY_OUT)


def progress_line(start: Start, time: int) -> str:
    """What a start that is not ready is doing at `time`, and for how long."""
    start.last = max(start.last, time)
    segments = phases.breakdown(start).segments
    phase = segments[-1].phase if segments else OTHER
    since = next((one.end for one in reversed(segments) if one.phase != phase), start.begin)
    whole, part = (time - start.begin) / 1e9, (time - since) / 1e9
    line = f"starting for {whole:.0f} s: {WORDS.get(phase, phase)} for {part:.0f} s"
    done = next((one.attrs for one in reversed(start.notes) if one.name == "progress" and one.time >= since), None)
    return line if done is None else f"{line} ({done.get('done')} of {done.get('total')} {done.get('what')})"


def table(start: Start, before: Start | None) -> str:
    """Seconds and share of each phase, and in the model's start `before`; lines without trailing space."""
    whole = phases.breakdown(start)
    old = phases.breakdown(before) if before is not None else None
    title = f"ready {whole.seconds:.1f} s after the process began"
    if before is not None and old is not None:
        title += f"; {before.temperature} before ({before.id}): {old.seconds:.1f} s".replace(";  ", "; ")
    head = f"  {'phase':<20} {'seconds':>8} {'share':>6}"
    lines = [f"{title} (vllm-compile-ext report {start.id})", head + (f" {'before':>8} {'change':>8}" if old else "")]
    for phase, was, seconds in phases.compare(old or whole, whole):
        a, b = was or 0.0, seconds or 0.0
        if max(a, b) >= 0.005:
            line = f"  {phase:<20} {b:>8.2f} {b / whole.seconds if whole.seconds else 0.0:>6.1%}"
            lines.append(line + (f" {a:>8.2f} {b - a:>+8.2f}" if old else ""))
    return "\n".join(lines)
