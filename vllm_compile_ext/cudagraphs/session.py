"""One model's graphs while it serves: what is asked for, captured within the budget, counted and remembered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm_compile_ext.cudagraphs.budget import MIB, Budget
from vllm_compile_ext.cudagraphs.counters import Counters
from vllm_compile_ext.cudagraphs.memory import Memory
from vllm_compile_ext.cudagraphs.policy import Policy, Shape
from vllm_compile_ext.startup.spans import note, span

logger = logging.getLogger(__name__)

# Shapes that may fail before no more are tried.
FAILURES = 3


@dataclass(frozen=True)
class Device:
    """What a session needs of the device and of the other ranks.

    capture: capture a shape on every rank or on none; what went wrong, or None.  free: bytes that are free.  agree:
    whether something holds on every rank.  from_first: the first rank's number.
    """

    capture: Callable[[Shape], Exception | None]
    free: Callable[[], int]
    agree: Callable[[bool], bool]
    from_first: Callable[[int], int]


class Session:
    """The graphs of one model on one rank."""

    def __init__(self, memory: Memory, layers: int, device: Device) -> None:
        self.memory = memory
        self.policy = Policy(memory.shapes, memory.before)
        self.budget = Budget(memory.need.size, layers)
        self.counters = Counters()
        self._device = device
        self._failures = 0
        self._batches = 0
        note("graphs", shapes=len(memory.shapes), kept_free=self.budget.limit, source=memory.need.source)
        logger.info(
            "CUDA graphs are captured on demand: %d shapes, none at start; %.2f GiB are kept free for them (%s)",
            len(memory.shapes),
            self.budget.limit / (1 << 30),
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
        free, start = self._device.free(), time.perf_counter()
        with span("capture graph", "graph capture", kind=shape.kind, tokens=shape.tokens):
            error = self._device.capture(shape)
        if error is not None:
            self._failed(shape, error)
            return False
        seconds, size = time.perf_counter() - start, free - self._device.free()
        self.policy.done(shape)
        self.budget.took(shape.kind, size)
        self.counters.capture(shape, seconds, self.budget.held)
        self.memory.keep(self.policy, self.budget)
        note("graphs", captured=1, kind=shape.kind, bytes=size, seconds=seconds)
        logger.debug("captured %s in %.3f s, %.1f MiB", shape.rest, seconds, size / MIB)
        return True

    def capture_idle(self) -> bool:
        """Capture the likeliest shape that is left; False when none is.  Ranks may remember different traffic: the
        first one's choice counts."""
        shape = self.policy.next_idle()
        number = self._device.from_first(-1 if shape is None else self.memory.shapes.index(shape))
        if number < 0:
            return False
        self.capture(self.memory.shapes[number])
        return bool(self.policy.left)

    def _may(self, shape: Shape) -> bool:
        reason = self.budget.refuse(shape.kind, self._device.free())
        if self._device.agree(reason is None):
            return True
        reason = reason or "another rank has no memory for them"
        left = [s for s in self.policy.left if s.kind == shape.kind]
        self._bar(left, reason)
        logger.warning(
            "no more %s CUDA graphs are captured, %s: %d shapes have one, %d run without; "
            "the next start keeps more free",
            shape.kind,
            reason,
            self.counters.captured[shape.kind],
            len(left),
        )
        return False

    def _failed(self, shape: Shape, error: Exception) -> None:
        self._failures += 1
        last = self._failures == FAILURES
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
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
