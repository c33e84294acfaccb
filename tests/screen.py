"""A terminal as far as tests need one: what is on the screen, and what has scrolled off it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from fcntl import ioctl

_SEQUENCE = re.compile(r"\x1b(?:\[([?0-9;]*)([A-Za-z])|([78DM]))")


class Screen:
    """Rows of characters, a cursor, a scrolling region (VT100: CUP, CUU, EL, ED, DECSTBM, DECSC, DECRC, IND)."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.cells = [[" "] * columns for _ in range(rows)]
        self.scrolled: list[str] = []
        self.top, self.bottom = 0, rows - 1
        self.row = self.column = 0
        self._saved = (0, 0)
        self._rest = ""

    def lines(self) -> list[str]:
        """The rows of the screen."""
        return ["".join(row).rstrip() for row in self.cells]

    def feed(self, text: str) -> None:
        text, self._rest, at = self._rest + text, "", 0
        while at < len(text):
            if text[at] != "\x1b":
                self._letter(text[at])
                at += 1
                continue
            found = _SEQUENCE.match(text, at)
            if found is None:
                assert len(text) - at < 12, f"unknown: {text[at : at + 20]!r}"
                self._rest = text[at:]
                return
            self._control(found[1] or "", found[2] or found[3])
            at = found.end()

    def _letter(self, letter: str) -> None:
        if letter == "\n":
            self._down()
        elif letter == "\r":
            self.column = 0
        elif letter >= " ":
            if self.column == self.columns:
                self.column = 0
                self._down()
            self.cells[self.row][self.column] = letter
            self.column += 1

    def _down(self) -> None:
        if self.row == self.bottom:
            gone = self.cells.pop(self.top)
            if self.top == 0:
                self.scrolled.append("".join(gone).rstrip())
            self.cells.insert(self.bottom, [" "] * self.columns)
        elif self.row < self.rows - 1:
            self.row += 1

    def _control(self, given: str, what: str) -> None:
        numbers = [int(number or 0) for number in given.lstrip("?").split(";")]
        if what == "7":
            self._saved = (self.row, self.column)
        elif what == "8":
            self.row, self.column = self._saved
        elif what == "D" and not given:
            self._down()
        elif what == "A":
            self.row = max(self.top if self.row >= self.top else 0, self.row - max(1, numbers[0]))
        elif what == "H":
            self.row, self.column = max(1, numbers[0]) - 1, max(1, (numbers[1:] or [1])[0]) - 1
        elif what == "K":
            first = 0 if numbers[0] == 2 else self.column
            self.cells[self.row][first:] = [" "] * (self.columns - first)
        elif what == "r":
            self.top, self.bottom = max(1, numbers[0]) - 1, ((numbers[1:] or [0])[0] or self.rows) - 1
            self.row = self.column = 0
        else:
            assert what in "mhl", f"unknown: {given}{what}"


def listen() -> None:
    """In a process to be: Ctrl-C is heard, also where the tests run in the background and it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(
    command: Sequence[str],
    screen: Screen,
    *,
    env: Mapping[str, str] | None = None,
    watch: Callable[[int], object] = lambda process: None,
    timeout: float = 60.0,
) -> int:
    """Run a command on a terminal of its own and feed `screen`; `watch` gets its process after each read."""
    process, terminal = pty.fork()
    if process == 0:
        try:
            listen()
            os.execvpe(command[0], list(command), {**os.environ, "TERM": "xterm-256color", **(env or {})})
        finally:
            os._exit(127)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", screen.rows, screen.columns, 0, 0))
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    data = os.read(terminal, 65536)
                except OSError:  # Linux: nobody has the terminal open any more
                    data = b""
                if not data:
                    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                screen.feed(data.decode(errors="replace"))
            watch(process)
        os.kill(process, 9)
        os.waitpid(process, 0)
        raise TimeoutError(f"{command} ran longer than {timeout} s: {screen.lines()}")
    finally:
        os.close(terminal)


PYTHON = sys.executable
