"""How far a cold compilation is: told to whoever shows the start, else a bar on a terminal."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from tqdm import tqdm

from vllm_compile_ext.record import progress

logger = logging.getLogger(__name__)


class Progress:
    """Pieces done of the distinct ones, and the current phase.

    Silent where INFO is hidden or stderr is no terminal, since the log's own lines tell there.  While a start is shown
    as a whole (`startup.display`) it is part of that, and there is no second bar.
    """

    def __init__(self, title: str, distinct: int, total: int) -> None:
        self._shared = progress.shown()
        self._done, self._distinct = 0, distinct
        shown = not self._shared and sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
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
        self._done += 1
        self._bar.update()
        self._tell("lowering")

    def phase(self, name: str) -> None:
        """Say what is going on behind the bar."""
        self._bar.set_postfix_str(name)
        self._tell(name)

    def _tell(self, doing: str) -> None:
        if self._shared:
            progress.advance(self._done, self._distinct, f"distinct pieces, {doing}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
