"""What a start is doing now: every process says it, the front end shows it (`startup.display`).

    progress.phase("weights")
    progress.advance(2, 3, "pieces")

Said by overwriting one short record in the folder that the processes share (`run_folder`), which exists only while
somebody shows it: where nobody does, this costs a comparison.  The last word counts: the front end waits for the engine
and the engine for its workers, so who spoke last is who the others wait for.  Nothing here raises.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_compile_ext import run_folder

logger = logging.getLogger(__name__)

NAME = "progress"  # of the file
SIZE = 512  # bytes of the record, written and read at once


@dataclass(frozen=True)
class State:
    """phase: what is going on, since `since` (unix seconds).  done, total: how far, of what; total 0 where unknown."""

    phase: str
    since: float
    done: int = 0
    total: int = 0
    what: str = ""


class Progress:
    """The voice of one process."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._file: int | None = None
        self._known: tuple[int, int] | None = None  # device and inode of the file that is open
        self._state = State("", 0.0)
        self._open: dict[str, str] = {}  # spans and their phases, the innermost last

    def shown(self) -> bool:
        """Whether somebody shows it."""
        return self._handle() is not None

    def phase(self, name: str) -> None:
        """`name` begins now, or goes on; "" is no news."""
        if name and name != self._state.phase:
            self._say(State(name, time.time()))

    def advance(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` are over in the current phase."""
        now = self._state
        self._say(State(now.phase, now.since or time.time(), done, total, what))

    def began(self, span: str, phase: str) -> None:
        """A span has begun, in a phase or ("") in that of the span around it."""
        if phase and self._handle() is not None:
            self._open[span] = phase
            self.phase(phase)

    def ended(self, span: str) -> None:
        """A span has ended: what is going on is what the one around it was begun for."""
        if self._open.pop(span, None) is not None and self._open:
            self.phase(next(reversed(self._open.values())))

    def _say(self, state: State) -> None:
        self._state = state
        handle = self._handle()
        if handle is None:
            return
        try:
            os.pwrite(handle, _encode(state), 0)
        except OSError as error:
            logger.debug("no progress is told: %s", error)

    def _handle(self) -> int | None:
        """The file, while it exists; a second start of this process has another one."""
        folder = run_folder.folder()
        if folder is None:
            return None
        if self._process != os.getpid():  # a fork: what was going on is the other one's
            self.__init__()  # type: ignore[misc]
        try:
            found = (folder / NAME).stat()
            if (found.st_dev, found.st_ino) != self._known:
                if self._file is not None:
                    os.close(self._file)
                self._file = self._known = None
                self._file = os.open(folder / NAME, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._known = (found.st_dev, found.st_ino)
        except OSError:
            return None
        return self._file


def _encode(state: State) -> bytes:
    record = [state.phase[:60], state.since, state.done, state.total, state.what[:60]]
    return json.dumps(record).encode()[:SIZE].ljust(SIZE)


def start(path: Path) -> None:
    """Make the file at `path`: from now on it is told.  Raises `OSError`."""
    path.write_bytes(bytes(SIZE))


def read(path: Path) -> State | None:
    """What was said last; None where nothing was, or the file is gone."""
    try:
        with path.open("rb") as file:
            phase, since, done, total, what = json.loads(file.read(SIZE))
        return State(str(phase), float(since), int(done), int(total), str(what))
    except (OSError, ValueError, TypeError):
        return None


_progress = Progress()
shown, phase, advance = _progress.shown, _progress.phase, _progress.advance
began, ended = _progress.began, _progress.ended
