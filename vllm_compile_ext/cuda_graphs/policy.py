"""Which graph a batch runs on, and which is captured for it.

Counts decide, never a clock: with tensor parallelism every rank sees the same batches, so that every rank decides the
same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

FULL = "FULL"
PIECEWISE = "PIECEWISE"

# Batches without a graph before one is captured, counted for sizes between two powers of two.  Capturing a whole decode
# step takes about as long as running it once without a graph, and the next step needs it again; a graph for a prompt's
# length takes as long as four batches save with it, and may never be needed again (H100, 80 layers: 0.06 and 0.15 s).
BATCHES = {FULL: 1, PIECEWISE: 4}
# Where a larger graph serves meanwhile.
BATCHES_PADDED = 16
# Batches between two captures that can wait, so that running requests meet one at a time.
BATCHES_BETWEEN = 8
# Batches until a shape is tried again for which there was no memory.
BATCHES_POSTPONED = 1000
# How much larger that may be: up to 64 tokens a step's time hardly depends on its size, and up to twice the size it is
# still shorter than launching every kernel.
PAD_FREELY = 64
PAD_FACTOR = 2


class Shape(NamedTuple):
    """What one graph is captured for.

    kind: `FULL` or `PIECEWISE`.  tokens: of the batch, padding included.  rest: what else sets two shapes apart.
    """

    kind: str
    tokens: int
    rest: Any = None


@dataclass(frozen=True)
class Plan:
    """capture: the shape to capture before the batch, which then runs on it.  otherwise: what it runs on if not; None
    for no graph."""

    capture: Shape | None
    otherwise: Shape | None


def _range(shape: Shape) -> tuple[str, int]:
    """The sizes that are counted together."""
    return shape.kind, (shape.tokens - 1).bit_length()


class Policy:
    """The state of every shape: captured, barred (with the reason) or neither.

    remembered: batches by shape in earlier starts.
    """

    def __init__(self, shapes: Iterable[Shape], remembered: Mapping[Shape, int] | None = None) -> None:
        self.shapes = tuple(shapes)
        self.captured: set[Shape] = set()
        self.barred: dict[Shape, str] = {}
        self.asked: Counter[Shape] = Counter()
        known = set(self.shapes)
        self.remembered = Counter({s: n for s, n in (remembered or {}).items() if s in known})
        self._batches = 0
        self._last = -BATCHES_BETWEEN
        self._not_before: dict[Shape, int] = {}
        self._without: Counter[tuple[str, int]] = Counter()

    def plan(self, best: Shape, compatible: Iterable[Shape]) -> Plan:
        """For a batch that stock runs on `best`.  compatible: the captured shapes that the batch fits in."""
        self._batches += 1
        self.asked[best] += 1
        if best in self.captured:
            return Plan(None, best)
        larger = self._larger(best, compatible)
        if larger is None:
            self._without[_range(best)] += 1
        if best in self.barred or not self._due(best, larger):
            return Plan(None, larger)
        return Plan(best, larger)

    def _due(self, shape: Shape, larger: Shape | None) -> bool:
        enough = (
            self._without[_range(shape)] >= BATCHES[shape.kind]
            if larger is None
            else self.asked[shape] >= BATCHES_PADDED
        )
        if not enough:
            return False
        if self._batches < self._not_before.get(shape, 0):
            return False
        urgent = shape.kind == FULL and larger is None
        return urgent or self._batches - self._last >= BATCHES_BETWEEN

    def _larger(self, best: Shape, compatible: Iterable[Shape]) -> Shape | None:
        limit = max(PAD_FREELY, PAD_FACTOR * best.tokens)
        near = [s for s in compatible if best.tokens <= s.tokens <= limit]
        return min(near, key=lambda s: (s.kind != FULL, s.tokens), default=None)

    def next_idle(self) -> Shape | None:
        """What to capture while there are no requests, the likeliest first: what traffic asked for, then decode steps
        from small to large."""
        return min(self.left, key=self._unlikely, default=None)

    def next_remembered(self) -> Shape | None:
        """What to capture before the first batch: what earlier starts had a graph captured for, the most used first."""
        if self._batches:
            return None
        known = [s for s in self.left if self.remembered[s] >= BATCHES[s.kind]]
        return min(known, key=self._unlikely, default=None)

    def _unlikely(self, shape: Shape) -> tuple[int, bool, int]:
        return (-self.remembered[shape] - self.asked[shape], shape.kind != FULL, shape.tokens)

    def done(self, shape: Shape) -> None:
        """`shape` is captured."""
        self._last = self._batches
        self._without[_range(shape)] = 0
        self.captured.add(shape)

    def postpone(self, shape: Shape) -> None:
        """There was no memory for `shape` at the moment."""
        self._not_before[shape] = self._batches + BATCHES_POSTPONED

    def bar(self, shapes: Collection[Shape], reason: str) -> None:
        """These are not captured any more in this process."""
        self._last = self._batches
        self.barred |= dict.fromkeys(shapes, reason)

    @property
    def left(self) -> list[Shape]:
        """Neither captured nor barred."""
        return [s for s in self.shapes if s not in self.captured and s not in self.barred]
