"""One model's graphs while it serves: what is asked for, captured within the budget, counted and remembered.

Counts decide, never a clock: with tensor parallelism every rank sees the same batches, so that every rank decides the
same.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_compile_ext import harmless
from vllm_compile_ext.cuda_graphs.memory import FULL, GIB, MIB, PIECEWISE, Budget, History
from vllm_compile_ext.record import metrics
from vllm_compile_ext.record.events import event, span

logger = logging.getLogger(__name__)

# Batches without a graph before one is captured, counted for sizes between two powers of two.  Capturing a whole decode
# step takes about as long as running it once without a graph, and the next step needs it again; a graph for a prompt's
# length takes as long as four batches save with it, and may never be needed again (H100, 80 layers: 0.06 and 0.15 s).
BATCHES = {FULL: 1, PIECEWISE: 4}
# Where a larger graph serves meanwhile, and takes little longer: a gap between requests comes first, as a rule.
BATCHES_PADDED = 128
# Where one serves that is larger than `_near`, since it is still faster than none.
BATCHES_FAR = 16
# Batches between two captures that can wait, so that running requests meet one at a time.
BATCHES_BETWEEN = 8
# Batches until a shape is tried again for which there was no memory.
BATCHES_POSTPONED = 1000
# What is near: up to 64 tokens a step's time hardly depends on its size, and up to twice the size it is still shorter
# than launching every kernel.
PAD_FREELY = 64
PAD_FACTOR = 2
# Shapes that may fail before no more are tried.
FAILURES = 3


class Shape(NamedTuple):
    """What one graph is captured for.

    kind: `FULL` or `PIECEWISE`.  tokens: of the batch, padding included.  rest: what else sets two shapes apart.
    """

    kind: str
    tokens: int
    rest: Any = None


class Times(NamedTuple):
    """Microseconds of a step of one size, on its graph and without one."""

    graph: int
    without: int


class Plan(NamedTuple):
    """capture: the shape to capture before the batch, which then runs on it.  otherwise: what it runs on if not; None
    for no graph."""

    capture: Shape | None
    otherwise: Shape | None


class Policy:
    """The state of every shape: captured, barred (with the reason) or neither.

    remembered: batches by shape in earlier starts.  times: of the steps that were measured, in earlier starts too.
    """

    def __init__(
        self,
        shapes: Iterable[Shape],
        remembered: Mapping[Shape, int] | None = None,
        times: Mapping[Shape, Times] | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.remembered = Counter(remembered or {})
        self.times = dict(times or {})
        self.captured: set[Shape] = set()
        self.barred: dict[Shape, str] = {}
        self.measured = set(self.times)
        self.asked: Counter[Shape] = Counter()
        self.batches = 0
        self._last = -BATCHES_BETWEEN
        self._gaps_from = 0  # gaps are left alone until so many batches
        self._not_before: dict[Shape, int] = {}
        self._without: Counter[tuple[str, int]] = Counter()

    @property
    def left(self) -> list[Shape]:
        """Neither captured nor barred."""
        return [s for s in self.shapes if s not in self.captured and s not in self.barred]

    def plan(self, best: Shape, compatible: Iterable[Shape]) -> Plan:
        """What to capture for a batch, and what to run it on otherwise.  best: what stock vLLM would run it on.
        compatible: the captured shapes that it fits in."""
        self.batches += 1
        self.asked[best] += 1
        if best in self.captured:
            return Plan(None, best)
        without = self._time_without(best)
        near = [s for s in compatible if s.tokens >= best.tokens and self._pays(s, best, without)]
        larger = min(near, key=lambda s: (s.kind != FULL, s.tokens), default=None)
        if larger is None:
            self._without[_sizes(best)] += 1
            due = self._without[_sizes(best)] >= BATCHES[best.kind]
        else:
            due = self.asked[best] >= (BATCHES_PADDED if _near(larger, best) else BATCHES_FAR)
        urgent = larger is None and best.kind == FULL
        apart = urgent or self.batches - self._last >= BATCHES_BETWEEN
        waits = best in self.barred or self.batches < self._not_before.get(best, 0)
        return Plan(best if due and apart and not waits else None, larger)

    def _time_without(self, best: Shape) -> int | None:
        """Microseconds without a graph of the next smaller step of this kind that was measured; None if none was."""
        smaller = [s for s in self.times if s.kind == best.kind and s.tokens <= best.tokens]
        return self.times[max(smaller, key=lambda s: s.tokens)].without if smaller else None

    def _pays(self, larger: Shape, best: Shape, without: int | None) -> bool:
        """Whether a batch for which stock has `best` is faster on the graph of `larger` than `without` one."""
        if larger not in self.times or without is None:
            return _near(larger, best)
        return self.times[larger].graph <= without

    def next_in_gap(self, *, everything: bool) -> Shape | None:
        """What to capture while there are no requests, the likeliest first; a captured shape is to be measured.

        That is what traffic asked for, in this start or earlier ones; in a model's first start, sizes that are powers
        of two; or `everything`.  The most used first, then decode steps, then from small to large.
        """
        if self.batches < self._gaps_from:
            return None
        known = self.remembered + self.asked
        shapes = [s for s in self.left if everything or self._is_likely(s)]
        chosen = min(shapes, key=lambda s: (-known[s], s.kind != FULL, s.tokens), default=None)
        return chosen or next((s for s in self.shapes if s in self.captured and s not in self.measured), None)

    def _is_likely(self, shape: Shape) -> bool:
        if not self.remembered and shape.tokens.bit_count() == 1:
            return True
        return bool(self.asked[shape]) or self.remembered[shape] >= BATCHES[shape.kind]

    def mark_captured(self, shape: Shape) -> None:
        self._last = self.batches
        self._without[_sizes(shape)] = 0
        self.captured.add(shape)

    def sleep(self) -> None:
        """Leave gaps alone until the next batch."""
        self._gaps_from = max(self._gaps_from, self.batches + 1)

    def postpone(self, shape: Shape) -> None:
        """Try `shape` again many batches later, and none in gaps until then: there is no memory for it now."""
        self._not_before[shape] = self._gaps_from = self.batches + BATCHES_POSTPONED

    def bar(self, shapes: Iterable[Shape], reason: str) -> None:
        """Never capture these in this process."""
        self._last = self.batches
        self.barred |= dict.fromkeys(shapes, reason)


def _near(larger: Shape, best: Shape) -> bool:
    return larger.tokens <= max(PAD_FREELY, PAD_FACTOR * best.tokens)


def _sizes(shape: Shape) -> tuple[str, int]:
    """Where misses are counted: together for all sizes between two powers of two."""
    return shape.kind, (shape.tokens - 1).bit_length()


@dataclass(frozen=True)
class Device:
    """What a session needs of the device, of the other ranks and of the store.

    capture: capture a shape on every rank or on none; what went wrong, or None.  measure: the times of a captured
    shape; None if they cannot be had.  free: bytes free on the device.  reserved: bytes that this process took of it.
    give_back: give back those that are unused.  agree: whether something holds on every rank.  from_first: the first
    rank's number.  keep: write what the next start is to know.
    """

    capture: Callable[[Shape], Exception | None]
    measure: Callable[[Shape], Times | None]
    free: Callable[[], int]
    reserved: Callable[[], int]
    give_back: Callable[[], None]
    agree: Callable[[bool], bool]
    from_first: Callable[[int], int]
    keep: Callable[[History], None]


class Session:
    """The graphs of one model on one rank.

    counts: by kind of graph, "captured"; "replayed", the batches that ran on one; "missed", those that ran without;
    "skipped", the shapes that will have none.  seconds: those of each capture.
    """

    def __init__(self, shapes: Sequence[Shape], budget: Budget, device: Device) -> None:
        known = dict(enumerate(shapes))
        self.policy = Policy(
            shapes,
            {known[n]: count for n, count in budget.used.items() if n in known},
            {known[n]: Times(*times) for n, times in budget.times.items() if n in known},
        )
        self.budget = budget
        self.counts = {what: Counter[str]() for what in ("captured", "replayed", "missed", "skipped")}
        self.seconds: list[float] = []
        self._device = device
        self._failures = 0
        self._waited = self._stopped = False
        room = budget.base + budget.limit
        words = "kept free for them:" if budget.kept else "of what the KV cache leaves they may take"
        line = (
            f"CUDA graphs are captured on demand: {len(shapes)} shapes, none at start; "
            f"{words} {room / GIB:.2f} GiB ({budget.source})"
        )
        event("graphs", line, shapes=len(shapes), kept_free=room, source=budget.source, kept=budget.kept)

    def choose_graph(self, best: Shape, captured: Iterable[Shape]) -> Shape | None:
        """The graph to run a batch on, captured now if one is due; None for no graph.

        best: what stock vLLM would use.  captured: the graphs that the batch fits in.
        """
        plan = self.policy.plan(best, captured)
        chosen = plan.capture if plan.capture is not None and self.capture(plan.capture) else plan.otherwise
        if chosen is None:
            self._count("missed", best.kind)
        else:
            self._count("replayed", chosen.kind)
        if self.policy.batches & (self.policy.batches - 1) == 0:  # ever more rarely: at 1, 2, 4, 8, ... batches
            self._keep()
        return chosen

    def use_gap(self, *, everything: bool) -> bool:
        """Capture or measure the likeliest shape while there are no requests; False when there is nothing to do now.

        everything: not only what is likely to be asked for.  Ranks may remember different traffic: the first one's
        choice counts.
        """
        shape = None if self._stopped else self.policy.next_in_gap(everything=everything)
        number = self._device.from_first(-1 if shape is None else self.policy.shapes.index(shape))
        if number < 0:
            return False
        chosen = self.policy.shapes[number]
        if chosen in self.policy.captured:
            self._measure(chosen)
            return True
        return self.capture(chosen) or chosen in self.policy.barred  # else it waits for memory

    def _measure(self, shape: Shape) -> None:
        """Ranks have to choose the same graphs: the first one's times count."""
        found = self._device.measure(shape) or Times(0, 0)
        times = Times(self._device.from_first(found.graph), self._device.from_first(found.without))
        self.policy.measured.add(shape)
        if all(times):
            self.policy.times[shape] = times
            line = (
                f"{shape.tokens} tokens take {times.graph} us on the {shape.kind} CUDA graph, {times.without} without"
            )
            event("measured", line, level=logging.DEBUG, kind=shape.kind, tokens=shape.tokens, **times._asdict())
            self._keep()

    def capture(self, shape: Shape) -> bool:
        """Capture `shape` if memory allows; True when it is there."""
        if not self._has_room(shape):
            return False
        free, reserved, start = self._device.free(), self._device.reserved(), time.perf_counter()
        with span("capture graph", "graph capture", kind=shape.kind, tokens=shape.tokens):
            error = self._device.capture(shape)
        if error is not None:
            self._give_up(shape, error)
            return False
        seconds = time.perf_counter() - start
        size = self.budget.add(shape.kind, free - self._device.free(), self._device.reserved() - reserved)
        self.policy.mark_captured(shape)
        self.seconds.append(seconds)
        self._count("captured", shape.kind)
        metrics.set("graph_bytes", self.budget.base + self.budget.held)
        line = f"captured a {shape.kind} CUDA graph for {shape.tokens} tokens in {seconds:.3f} s, {size / MIB:.1f} MiB"
        facts = {"kind": shape.kind, "tokens": shape.tokens, "bytes": size, "seconds": seconds}
        event("captured", line, level=logging.DEBUG, **facts)
        self._keep()
        return True

    def _has_room(self, shape: Shape) -> bool:
        """Whether every rank has memory for `shape`.  They vote twice, so that all give up or postpone the same."""
        kind, left = shape.kind, Counter(s.kind for s in self.policy.left)
        # A decode step without a graph costs more than a prompt without one, and there are more of them.
        refusal = self.budget.refusal(kind, left[FULL] if kind != FULL else 0)
        if not self._device.agree(refusal is None):
            reason = refusal or "another rank has no memory for them"
            line = (
                f"no more {kind} CUDA graphs are captured, {reason}: {self.counts['captured'][kind]} shapes have one, "
                f"{left[kind]} run without; the next start keeps more free"
            )
            self._skip([s for s in self.policy.left if s.kind == kind], reason, line)
            self._keep()
            return False
        if self.budget.shortage(kind, self._device.free()):
            self._device.give_back()
        shortage = self.budget.shortage(kind, self._device.free())
        if self._device.agree(shortage is None):
            return True
        self.policy.postpone(shape)
        if not self._waited:
            self._waited = True
            logger.warning("a %s CUDA graph waits: %s", kind, shortage or "another rank has no memory for it")
        return False

    def _give_up(self, shape: Shape, error: Exception) -> None:
        self._failures += 1
        last = self._failures == FAILURES
        reason = harmless.error(error)
        line = (
            f"batches of {shape.tokens} tokens run without a {shape.kind} CUDA graph, capturing it failed"
            f"{' and no more are captured' if last else ''} ({reason})"
        )
        self._skip(self.policy.left if last else [shape], reason, line)
        self._keep()

    def stop(self, error: Exception) -> None:
        """After a surprise: what is captured is used, nothing more is captured."""
        logger.debug("what stopped the capture of CUDA graphs", exc_info=error)
        if not self._stopped:
            self._stopped = True
            reason = harmless.error(error)
            self._skip(self.policy.left, reason, f"no more CUDA graphs are captured ({reason})")

    def _skip(self, shapes: list[Shape], reason: str, line: str) -> None:
        self.policy.bar(shapes, reason)
        for kind, number in Counter(s.kind for s in shapes).items():
            self._count("skipped", kind, number)
        event("graphs skipped", line, shapes=len(shapes), reason=reason)

    def _count(self, what: str, kind: str, number: int = 1) -> None:
        self.counts[what][kind] += number
        metrics.inc(f"graphs_{what}_total", number, kind=kind)

    def _keep(self) -> None:
        """Have the next start know what graphs took and what traffic asked for."""
        used, times = self.policy.asked + self.policy.remembered, self.policy.times
        without = [s for s in self.policy.shapes if s not in self.policy.captured]
        history = self.budget.remember(
            used={number: used[shape] for number, shape in enumerate(self.policy.shapes) if used[shape]},
            times={number: times[shape] for number, shape in enumerate(self.policy.shapes) if shape in times},
            asked=Counter(s.kind for s in without if used[s]),
            unasked=Counter(s.kind for s in without if not used[s]),
        )
        self._device.keep(history)
