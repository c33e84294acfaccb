"""The shapes of a small model, as upstream would list them, and a device that only counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vllm_compile_ext.cuda_graphs.memory import FULL, MIB, PIECEWISE, Budget, History
from vllm_compile_ext.cuda_graphs.ranks import RanksDifferError
from vllm_compile_ext.cuda_graphs.session import Device, Session, Shape, Times

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GRAPH = 4 * MIB
MUCH = 1 << 40


def decode(tokens: int) -> Shape:
    return Shape(FULL, tokens, f"decode {tokens}")


def mixed(tokens: int) -> Shape:
    return Shape(PIECEWISE, tokens, f"mixed {tokens}")


DECODE = [decode(size) for size in SIZES]
MIXED = [mixed(size) for size in SIZES]
# Largest first, as upstream captures them.
ALL = MIXED[::-1] + DECODE[::-1]


def fits(best: Shape, captured: Iterable[Shape]) -> list[Shape]:
    """The captured shapes that a batch fits in for which stock has `best`: a prompt fits in no decode graph."""
    return [s for s in captured if s.tokens >= best.tokens and (best.kind == FULL or s.kind == PIECEWISE)]


def places(used: dict[Shape, int]) -> dict[int, int]:
    """What earlier starts used, as a `Budget` has it."""
    return {ALL.index(shape): count for shape, count in used.items()}


def budget(limit: int = MUCH, layers: int = 1, **options: Any) -> Budget:
    return Budget("key", layers, limit=limit, source="an estimate", **({"base": 0, "kept": True} | options))


class Gpu:
    """Memory that graphs take, and the shapes that fail.

    unused: what this process has taken of the device and does not use.  others: what other processes take during each
    capture.  kept: what the next start would be told.  times: of a step, as `Device.measure` finds them.
    size: bytes of a graph.
    """

    def __init__(self, free: int = MUCH, failing: Iterable[Shape] = (), unused: int = 0, others: int = 0) -> None:
        self.memory, self.unused, self.others, self.reserved = free, unused, others, unused
        self.failing = set(failing)
        self.given_back = 0
        self.tried: list[Shape] = []
        self.times: Callable[[Shape], Times | None] = lambda shape: Times(4000 + shape.tokens, 60000)
        self.measured: list[Shape] = []
        self.size: Callable[[Shape], int] = lambda shape: GRAPH
        self.kept: list[History] = []

    def capture(self, shape: Shape) -> Exception | None:
        self.tried.append(shape)
        if shape in self.failing:
            return RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")
        self.memory -= self.size(shape) + self.others
        self.reserved += self.size(shape)
        return None

    def measure(self, shape: Shape) -> Times | None:
        self.measured.append(shape)
        return self.times(shape)

    def give_back(self) -> None:
        self.given_back += 1
        self.memory += self.unused
        self.reserved -= self.unused
        self.unused = 0

    def session(
        self,
        limit: int = MUCH,
        agree: Callable[[bool], bool] = bool,
        from_first: Callable[[Any], Any] = int,
        **options: Any,
    ) -> Session:
        """A session with ``budget(limit, **options)``, which captures where every rank agrees that it could."""

        def capture(shape: Shape) -> Exception | None:
            error = self.capture(shape)
            return None if agree(error is None) else error or RanksDifferError("it failed on another rank")

        device = Device(
            capture,
            self.measure,
            lambda: self.memory,
            lambda: self.reserved,
            self.give_back,
            agree,
            from_first,
            self.kept.append,
        )
        return Session(ALL, budget(limit, **options), device)


def ask(made: Session, best: Shape) -> Shape | None:
    """What a batch runs on for which stock has `best`."""
    return made.choose_graph(best, fits(best, made.policy.captured))
