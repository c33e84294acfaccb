"""What a session needs of the rest: a memory that forgets and a device that only counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from tests.unit.cuda_graphs.shapes import ALL
from vllm_compile_ext.cuda_graphs.budget import MIB, Budget
from vllm_compile_ext.cuda_graphs.memory import Need
from vllm_compile_ext.cuda_graphs.policy import Policy, Shape
from vllm_compile_ext.cuda_graphs.session import Device

GRAPH = 4 * MIB


class Remembered:
    """In the place of `Memory`.  each: what a graph took in an earlier start.  kept: how often there was something to
    remember."""

    def __init__(
        self, limit: int, before: dict[Shape, int] | None = None, kept: bool = True, each: dict[str, int] | None = None
    ) -> None:
        self.shapes = ALL
        self.before = Counter(before or {})
        self.need = Need(limit, limit, "an estimate", kept)
        self.each = each or {}
        self.kept = 0

    def keep(self, policy: Policy, budget: Budget) -> None:
        self.kept += 1


class Gpu:
    """Memory that graphs take, and the shapes that fail, with what they raise.

    unused: what this process has taken of the device and does not use.  others: what other processes take during each
    capture.
    """

    def __init__(self, free: int = 1 << 40, failing: Iterable[Shape] = (), unused: int = 0, others: int = 0) -> None:
        self.memory = free
        self.unused = unused
        self.others = others
        self.reserved = unused
        self.given_back = 0
        self.failing = set(failing)
        self.tried: list[Shape] = []

    def capture(self, shape: Shape) -> Exception | None:
        self.tried.append(shape)
        if shape in self.failing:
            return RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")
        self.memory -= GRAPH + self.others
        self.reserved += GRAPH
        return None

    def give_back(self) -> None:
        self.given_back += 1
        self.memory += self.unused
        self.reserved -= self.unused
        self.unused = 0

    def device(
        self,
        agree: Callable[[bool], bool] = lambda ok: ok,
        from_first: Callable[[int], int] = lambda number: number,
    ) -> Device:
        return Device(self.capture, lambda: self.memory, lambda: self.reserved, self.give_back, agree, from_first)
