"""A bar on a terminal while pieces compile; nothing elsewhere, where the log's own lines tell."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Pieces done of the distinct ones, and the current phase; silent where INFO is hidden or stderr is no terminal."""

    def __init__(self, title: str, distinct: int, total: int) -> None:
        shown = sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
        self._bar = tqdm(
            total=distinct,
            desc=f"{title} {distinct} distinct of {total} pieces",
            unit="piece",
            disable=not shown,
            leave=False,
            dynamic_ncols=True,
        )
        self.phase("lowering")

    def __enter__(self) -> Progress:
        return self

    def advance(self) -> None:
        """One more piece is lowered."""
        self._bar.update()

    def phase(self, name: str) -> None:
        """Say what is going on behind the bar."""
        self._bar.set_postfix_str(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
