"""What the front end says of its start: what goes on while it lasts, a table when it is ready, and its spans by OTLP.

All of it is read from the file that the processes of the start write, in a thread of the process that made the file.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.record import metrics, otlp, phases, read
from vllm_compile_ext.record.read import Start
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
    phases.OTHER: "something that no span names",
}


class Watcher(threading.Thread):
    """Looks at the start that `recorder` records in the file `path` until it is over.

    endpoint: where vLLM is told to send its traces.
    """

    def __init__(self, recorder: Recorder, path: Path, endpoint: str | None = None) -> None:
        super().__init__(daemon=True, name="start-watcher")
        self._recorder, self._path = recorder, path
        self._replay = otlp.Replay(endpoint)

    def run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # serving does not depend on it
            logger.debug("this start is watched no more: %s: %s", type(error).__name__, error)

    def _watch(self) -> None:
        progress, said = settings.load().VLLM_COMPILE_PROGRESS, False
        while True:
            # With several API servers it is another process that gets ready, and its lines in the file say so.
            self._recorder.changed.wait(None if self._recorder.ready_at is not None else EVERY)
            self._recorder.changed.clear()
            over = self._recorder.over
            start = read.read(self._path)
            if start.ready is not None and not said:
                said = True
                _say_ready(start)
            if start.ready is not None or over:
                self._export(start, over=over)
            elif now() - start.begin > LONGEST:
                return
            elif progress:
                logger.info("%s", progress_line(start, now()))
            if over:
                return
            if start.first_token is not None:
                self._recorder.done(start.first_token)

    def _export(self, start: Start, *, over: bool) -> None:
        try:
            self._replay.send(start, over=over)
        except Exception as error:
            logger.warning("spans of this start were not exported: %s", harmless.error(error))


def _say_ready(start: Start) -> None:
    for row in phases.breakdown(start).rows:
        metrics.set("startup_seconds", row.seconds, phase=row.phase)
    logger.info("%s", table(start, read.previous(start)))


def progress_line(start: Start, time: int) -> str:
    """What a start that is not ready is doing at `time`, and for how long."""
    start.last = max(start.last, time)
    segments = phases.breakdown(start).segments
    phase, since = phases.OTHER, start.begin
    if segments:
        phase = segments[-1].phase
        since = next((one.end for one in reversed(segments) if one.phase != phase), since)
    line = (
        f"starting for {(time - start.begin) / 1e9:.0f} s: {WORDS.get(phase, phase)} for {(time - since) / 1e9:.0f} s"
    )
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
    for row in phases.compare(old or whole, whole):
        if max(row.new or 0.0, row.old or 0.0) >= 0.005:
            share = (row.new or 0.0) / whole.seconds if whole.seconds else 0.0
            line = f"  {row.phase:<20} {row.new or 0.0:>8.2f} {share:>6.1%}"
            lines.append(line + (f" {row.old or 0.0:>8.2f} {row.seconds:>+8.2f}" if old else ""))
    return "\n".join(lines)
