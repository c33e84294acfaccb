"""Saying what a command is doing while it takes minutes."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.status import Status


class Progress:
    """Says what is going on: a live line with a clock on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._text = ""
        self._since = time.monotonic()
        self._status: Status | None = console.status("") if console.is_terminal else None
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._end = threading.Event()

    def __enter__(self) -> Progress:
        if self._status:
            self._status.start()
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._status:
            self._ticker.join()
            self._status.stop()

    def task(self, title: str) -> None:
        """Begin something whose seconds count from now."""
        self._since = time.monotonic()
        self.step(title)

    def step(self, text: str) -> None:
        self._text = text
        if not self._status:
            self.console.print(f"{self.seconds():6.1f} s  {text}", markup=False)

    def done(self, text: str) -> None:
        """Leave a line behind: `text` is over."""
        self.console.print(f"{self.seconds():6.1f} s  {text}: done", markup=False)

    def seconds(self) -> float:
        return time.monotonic() - self._since

    def _tick(self) -> None:
        assert self._status is not None
        while not self._end.wait(0.2):
            self._status.update(f"{self._text} ({self.seconds():.0f} s)")
