"""Runs a program in a session of its own, and ends it with everything that it has started.

`Program` is how the commands start vLLM: entered it runs, left it is gone, whatever happened in between.
`interruptible` makes Ctrl-C, SIGTERM and a closed terminal leave it in order too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

END_TIMEOUT = 15.0  # seconds that a program has to end after SIGTERM, and its processes to vanish after SIGKILL
READ_TIMEOUT = 5.0  # seconds for what is left of the output of a program that has ended
PAUSE = 0.05  # seconds between two looks at a program
EXCERPT = 25  # lines of a log that an error shows

_signals: list[int] = []  # that have come since `interruptible` was entered


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End with status 128 + the signal's number on Ctrl-C, SIGTERM or a closed terminal, after the programs have ended.

    A signal that this process was started to ignore stays ignored: a shell does so with SIGINT for a script's
    background jobs, nohup with SIGHUP.
    """

    # Remembered, and raised where a program is waited for: an exception raised from here could come up anywhere, and
    # CPython 3.11 loses it in a finalizer, or leaves the lock of `Popen.poll` taken.
    def remember(number: int, frame: FrameType | None) -> None:
        _signals.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, remember) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
        exit_on_signal()
    finally:
        if _signals:
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print("interrupted; what was started has been ended", file=sys.stderr)
        _signals.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_signal() -> None:
    """Exit when a signal has come."""
    if _signals:
        sys.exit(128 + _signals[0])


@dataclass(frozen=True)
class Line:
    """One line of a program's output; `at` is when it arrived, in seconds since the start."""

    at: float
    text: str


class ProgramError(RuntimeError):
    """A program did not do what it was started for; `lines` are its output."""

    def __init__(self, what: str, lines: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.lines = list(lines)


class Program:
    """A command and all processes of its session, as a context manager.

    log: a file that gets the output too.  listen: called with each `Line`, from a thread of its own.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        log: Path | None = None,
        listen: Callable[[Line], None] | None = None,
    ) -> None:
        self.lines: list[Line] = []
        self._command, self._env, self._log, self._listen = list(command), dict(env), log, listen

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self.signal(signal.SIGTERM)
            end, signals = time.monotonic() + END_TIMEOUT, len(_signals)
            while self.running and time.monotonic() < end and len(_signals) == signals:  # a second Ctrl-C: at once
                time.sleep(PAUSE)
        finally:
            end = time.monotonic() + END_TIMEOUT  # waited for, since the next program needs their memory
            while (self.signal(signal.SIGKILL) or self.running) and time.monotonic() < end:
                time.sleep(PAUSE)
            self._reader.join(END_TIMEOUT)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the command itself has not ended yet."""
        return self._process.poll() is None

    def elapsed(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait for its end; returns the exit status.  Raises `ProgramError` after `timeout` seconds."""
        while (status := self._process.poll()) is None:
            if self.elapsed() > timeout:
                raise self.error(f"not done after {timeout:.0f} s")
            exit_on_signal()
            time.sleep(PAUSE)
        self._reader.join(READ_TIMEOUT)  # a process that it left may keep the pipe open
        return status

    def error(self, what: str) -> ProgramError:
        """A `ProgramError` with the output so far."""
        return ProgramError(what, [line.text for line in self.lines])

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("wb", buffering=0) if self._log else contextlib.nullcontext() as file:
            for raw in self._process.stdout:
                line = Line(self.elapsed(), raw.decode(errors="replace").rstrip())
                self.lines.append(line)
                if file:
                    file.write(raw)
                if self._listen:
                    try:
                        self._listen(line)
                    except OSError:  # the terminal is gone: read on, or the program waits for ever
                        self._listen = None

    def signal(self, number: int) -> bool:
        """Send a signal to the session's processes; returns whether one was still running."""
        found = False
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(OSError):  # it has just ended
                # A zombie has given its memory back.
                if os.getsid(process.pid) == self.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found = True
                    os.kill(process.pid, number)
        return found


def excerpt(lines: Sequence[str]) -> list[str]:
    """The end of the first error in vLLM's log, or of the log.

    The process that failed first says why, in lines with the same beginning; the ones that waited for it fail later.
    """
    first = next((line for line in lines if " ERROR " in line), None)
    if first is None:
        return list(lines[-EXCERPT:])
    process = first.partition(" ERROR ")[0]
    return [line for line in lines if line.startswith(f"{process} ERROR ")][-EXCERPT:]
