"""The last line of a terminal, kept out of the way of everything else that is written there.

Several processes write to the terminal of a server: log lines, bars of tqdm, warnings of libraries in C++.  None of
them knows of a status line, and erasing and redrawing one between their lines would need them all to.  So the rows
above the last one become the terminal's scrolling region (DECSTBM, as `apt` does it): whatever anybody writes stays
there, and the line is drawn below, in one write that puts the cursor back.
"""

from __future__ import annotations

import os
from contextlib import suppress

ROWS, COLUMNS = 8, 30  # the smallest terminal that gives up a row

SAVE, RESTORE = "\x1b7", "\x1b8"  # the cursor, with its colours
WHOLE = "\x1b[r"  # the scrolling region; sends the cursor home
DIM, PLAIN, ERASE = "\x1b[2m", "\x1b[0m", "\x1b[2K"


class BottomLine:
    """Of the terminal that the file descriptor `terminal` is."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._rows = 0  # of the terminal while it is set up, else 0
        self._text = ""

    @staticmethod
    def possible(terminal: int, term: str | None) -> bool:
        """Whether it is a terminal that can do this."""
        if not term or term.startswith(("dumb", "unknown", "emacs")):
            return False
        try:
            size = os.get_terminal_size(terminal)
        except OSError:
            return False
        return os.isatty(terminal) and size.lines >= ROWS and size.columns >= COLUMNS

    def draw(self, text: str) -> None:
        """Show `text`, cut to the width of the terminal.  While the program is in the background nothing is shown."""
        try:
            if not self._in_front():
                self.close()
                return
            size = os.get_terminal_size(self._terminal)
            if size.lines < ROWS:
                self.close()
                return
            text = text[: size.columns - 1]
            begin = "" if size.lines == self._rows else self._set_up(size.lines)
            if begin or text != self._text:
                self._text = text
                self._write(f"{begin}{SAVE}\x1b[{size.lines};1H{ERASE}{DIM}{text}{PLAIN}{RESTORE}")
        except OSError:  # the terminal is gone
            self._rows = 0

    def close(self) -> None:
        """Give the row back, empty."""
        if self._rows:
            rows, self._rows, self._text = self._rows, 0, ""
            with suppress(OSError):
                self._write(f"{SAVE}{WHOLE}\x1b[{rows};1H{ERASE}{RESTORE}")

    def _set_up(self, rows: int) -> str:
        before, self._rows = self._rows, rows
        clear = f"{SAVE}{WHOLE}\x1b[{before};1H{ERASE}{RESTORE}" if 0 < before < rows else ""
        # Down and up: a cursor in the last row comes out of it, with what is written there, and stays in its column.
        return f"{clear}\x1bD\x1b[1A{SAVE}\x1b[1;{rows - 1}r{RESTORE}"

    def _in_front(self) -> bool:
        try:
            return os.tcgetpgrp(self._terminal) == os.getpgrp()
        except OSError:  # not the terminal that controls this process, as under `docker exec`
            return True

    def _write(self, text: str) -> None:
        # The kernel writes the bytes of one call together (drivers/tty, `tty_write_lock`).
        os.write(self._terminal, text.encode(errors="replace"))
