"""Shows what a start is doing while it lasts: one line at the bottom of a terminal, elsewhere a line now and then.

A thread of the front end looks at what the processes say (`startup.progress`).  vLLM draws bars of its own while
weights load and graphs are captured; they stay as they are, and the line says the phase and the time.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from vllm_compile_ext import run_folder, settings
from vllm_compile_ext.record import progress
from vllm_compile_ext.record.bottom_line import BottomLine
from vllm_compile_ext.record.progress import State

logger = logging.getLogger(__name__)

TICK = 0.25  # seconds between two looks
EVERY = 10.0  # seconds between two lines about one phase in a log
LONGEST = 3600.0  # seconds after which a start that never said "ready" is shown no more
READY = "ready"  # the phase that ends it
CELLS = 20  # of a bar
# Phases whose names say too little to who waits.
WORDS = {
    "config": "reading the configuration",
    "spawn": "importing in another process",  # until it has loaded the plugin
    "compile": "compiling",
    "weights": "loading weights",
    "graph capture": "capturing graphs",
    "load compiled code": "loading compiled code",
    "api server": "starting the server",
}


class _Where(Protocol):
    def show(self, state: State, elapsed: float) -> None: ...
    def close(self) -> None: ...


class Log:
    """Lines in the log: for a phase that takes long, one every `EVERY` seconds."""

    def __init__(self) -> None:
        self._phase, self._since, self._said = "", 0.0, 0

    def show(self, state: State, elapsed: float) -> None:
        if (state.phase, state.since) != (self._phase, self._since):
            self._phase, self._since, self._said = state.phase, state.since, 0
        spent = time.time() - state.since
        if int(spent / EVERY) > self._said:
            self._said = int(spent / EVERY)
            logger.info("starting for %.0f s: %s for %.0f s%s", elapsed, words(state), spent, _count(state, " (", ")"))

    def close(self) -> None:
        pass


class Terminal:
    """The bottom line of a terminal."""

    def __init__(self, terminal: int, encoding: str) -> None:
        self._line = BottomLine(terminal)
        self._full, self._empty = ("\N{BOX DRAWINGS HEAVY HORIZONTAL}", "\N{BOX DRAWINGS LIGHT HORIZONTAL}")
        try:
            (self._full + self._empty).encode(encoding)
        except (UnicodeError, LookupError):
            self._full, self._empty = "#", "-"

    def show(self, state: State, elapsed: float) -> None:
        before = int(max(0.0, elapsed - (time.time() - state.since)))  # both clocks change at the same moment
        parts = [f"vLLM is starting, {int(elapsed)} s", f"{words(state)} {max(0, int(elapsed) - before)} s"]
        if state.total > 0:
            full = round(CELLS * min(state.done, state.total) / state.total)
            parts.append(f"{self._full * full}{self._empty * (CELLS - full)} {_count(state)}")
        self._line.draw(" | ".join(parts))

    def close(self) -> None:
        self._line.close()


def words(state: State) -> str:
    """The phase, for people."""
    return WORDS.get(state.phase, state.phase)


def _count(state: State, before: str = "", after: str = "") -> str:
    return f"{before}{state.done} of {state.total} {state.what}".rstrip() + after if state.total > 0 else ""


class Display:
    """Shows the file at `path` until `stop`; `begin` is when the start began (unix seconds)."""

    def __init__(self, path: Path, where: _Where, begin: float) -> None:
        self._path, self._where, self._begin = path, where, begin
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="startup-progress")

    def start(self) -> None:
        """Begin.  Raises `OSError`."""
        progress.start(self._path)
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """End, with the terminal as it was; twice is the same as once."""
        self._end.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        atexit.unregister(self.stop)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            shown = State("config", time.time())
            while not self._end.wait(TICK) and time.time() - self._begin < LONGEST:
                shown = progress.read(self._path) or shown
                if shown.phase == READY:
                    break
                self._where.show(shown, time.time() - self._begin)
        except Exception as error:  # it is only shown
            logger.debug("no progress is shown: %s: %s", type(error).__name__, error)
        finally:
            self._where.close()


_display: Display | None = None
_process = 0  # that shows; a fork does not


def show(begin: float) -> None:
    """Show the start that began at `begin` (unix seconds), where this is the front end and INFO is logged."""
    global _display, _process
    folder = run_folder.folder()
    if _display is not None or folder is None or not run_folder.is_owner() or not logger.isEnabledFor(logging.INFO):
        return
    if not settings.load().VLLM_COMPILE_PROGRESS:
        return
    terminal = 2
    possible = BottomLine.possible(terminal, os.environ.get("TERM"))
    where = Terminal(terminal, getattr(sys.stderr, "encoding", None) or "ascii") if possible else Log()
    made = Display(folder / progress.NAME, where, begin)
    try:
        made.start()
    except (OSError, RuntimeError) as error:
        logger.debug("no progress is shown: %s", error)
        return
    _display, _process = made, os.getpid()


def hide() -> None:
    """The start is over; said in the front end, or in an API server that it has started."""
    global _display
    progress.phase(READY)
    if _display is not None and _process == os.getpid():
        _display.stop()
    _display = None
