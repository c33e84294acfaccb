"""One model's graphs while it serves: what is asked for, captured within the budget, counted and remembered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm_compile_ext import harmless
from vllm_compile_ext.cuda_graphs.budget import MARGIN, MIB, UNKEPT_MARGIN, Budget
from vllm_compile_ext.cuda_graphs.counters import Counters
from vllm_compile_ext.cuda_graphs.memory import Memory
from vllm_compile_ext.cuda_graphs.policy import FULL, Policy, Shape
from vllm_compile_ext.record.spans import note, span

logger = logging.getLogger(__name__)

# Shapes that may fail before no more are tried.
FAILURES = 3


class RanksDifferError(RuntimeError):
    """A graph is not captured on every rank; the message says why."""


@dataclass(frozen=True)
class Device:
    """What a session needs of the device and of the other ranks.

    capture: capture a shape on every rank or on none; what went wrong, or None.  free: bytes free on the device.
    reserved: bytes that this process took of it.  give_back: give back those that are unused.  agree: whether something
    holds on every rank.  from_first: the first rank's number.
    """

    capture: Callable[[Shape], Exception | None]
    free: Callable[[], int]
    reserved: Callable[[], int]
    give_back: Callable[[], None]
    agree: Callable[[bool], bool]
    from_first: Callable[[int], int]


class Session:
    """The graphs of one model on one rank."""

    def __init__(self, memory: Memory, layers: int, device: Device, base: int = 0) -> None:
        self.memory = memory
        self.policy = Policy(memory.shapes, memory.before)
        margin = MARGIN if memory.need.kept else UNKEPT_MARGIN
        self.budget = Budget(memory.need.graphs, layers, margin=margin, base=base, each=memory.each)
        self.counters = Counters()
        self._device = device
        self._failures = 0
        self._batches = 0
        self._told = self._stopped = False
        note(
            "graphs",
            shapes=len(memory.shapes),
            kept_free=base + self.budget.limit,
            source=memory.need.source,
            kept=memory.need.kept,
        )
        logger.info(
            "CUDA graphs are captured on demand: %d shapes, none at start; %s %.2f GiB (%s)",
            len(memory.shapes),
            "kept free for them:" if memory.need.kept else "of what the KV cache leaves they may take",
            (base + self.budget.limit) / (1 << 30),
            memory.need.source,
        )

    def graph_for(self, best: Shape, captured: Iterable[Shape]) -> Shape | None:
        """What a batch runs on for which stock has `best`; `captured` are the graphs that it fits in."""
        plan = self.policy.plan(best, captured)
        chosen = plan.capture if plan.capture is not None and self.capture(plan.capture) else plan.otherwise
        self.counters.batch(best, chosen)
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:  # ever more rarely: at 1, 2, 4, 8, ... batches
            self.memory.keep(self.policy, self.budget)
        return chosen

    def capture(self, shape: Shape) -> bool:
        """Capture `shape` if memory allows; True when it is there."""
        if not self._may(shape):
            return False
        free, reserved, start = self._device.free(), self._device.reserved(), time.perf_counter()
        with span("capture graph", "graph capture", kind=shape.kind, tokens=shape.tokens):
            error = self._device.capture(shape)
        if error is not None:
            self._failed(shape, error)
            return False
        seconds, grown = time.perf_counter() - start, self._device.reserved() - reserved
        self.policy.done(shape)
        size = self.budget.took(shape.kind, free - self._device.free(), grown)
        base_and_graphs = self.budget.base + self.budget.held
        self.counters.capture(shape, seconds, base_and_graphs)
        self.memory.keep(self.policy, self.budget)
        note("graphs", captured=1, kind=shape.kind, bytes=size, seconds=seconds)
        logger.debug("captured %s in %.3f s, %.1f MiB", shape.rest, seconds, size / MIB)
        return True

    def capture_idle(self, *, remembered: bool = False) -> bool:
        """Capture the likeliest shape that is left, of those `remembered` or of all; False when there is none.  Ranks
        may remember different traffic: the first one's choice counts."""
        shape = self.policy.next_remembered() if remembered else self.policy.next_idle()
        number = self._device.from_first(-1 if shape is None else self.memory.shapes.index(shape))
        if number < 0:
            return False
        chosen = self.memory.shapes[number]
        waits = not self.capture(chosen) and chosen not in self.policy.barred  # for memory
        return not waits and bool(self.policy.left)

    def _may(self, shape: Shape) -> bool:
        # Two votes, so that every rank bars the same or postpones the same, and none captures what others do not ask
        # for any more.
        # A decode step without a graph costs more than a prompt without one, and there are more of them.
        later = sum(s.kind == FULL for s in self.policy.left) if shape.kind != FULL else 0
        over = self.budget.over(shape.kind, later)
        if not self._device.agree(over is None):
            self._used_up(shape.kind, over or "another rank has no memory for them")
            return False
        short = self._short(shape.kind)
        if self._device.agree(short is None):
            return True
        self.policy.postpone(shape)
        if not self._told:
            self._told = True
            logger.warning("a %s CUDA graph waits: %s", shape.kind, short or "another rank has no memory for it")
        return False

    def _short(self, kind: str) -> str | None:
        if self.budget.short(kind, self._device.free()) is None:
            return None
        self._device.give_back()
        return self.budget.short(kind, self._device.free())

    def _used_up(self, kind: str, reason: str) -> None:
        left = [s for s in self.policy.left if s.kind == kind]
        self._bar(left, reason)
        logger.warning(
            "no more %s CUDA graphs are captured, %s: %d shapes have one, %d run without; "
            "the next start keeps more free",
            kind,
            reason,
            self.counters.captured[kind],
            len(left),
        )

    def stop(self, error: Exception) -> None:
        """After a surprise: what is captured is used, nothing more is captured."""
        if not self._stopped:
            self._stopped = True
            logger.warning("no more CUDA graphs are captured (%s)", harmless.error(error))
            logger.debug("what stopped the capture of CUDA graphs", exc_info=error)
        left = self.policy.left
        self.policy.bar(left, harmless.error(error))
        self.counters.skip(left)

    def _failed(self, shape: Shape, error: Exception) -> None:
        self._failures += 1
        last = self._failures == FAILURES
        reason = harmless.error(error)
        self._bar(self.policy.left if last else [shape], reason)
        logger.warning(
            "batches of %d tokens run without a %s CUDA graph, capturing it failed%s (%s)",
            shape.tokens,
            shape.kind,
            " and no more are captured" if last else "",
            reason,
        )

    def _bar(self, shapes: list[Shape], reason: str) -> None:
        self.policy.bar(shapes, reason)
        self.counters.skip(shapes)
        self.memory.keep(self.policy, self.budget)
