"""The shapes of a small model, as upstream would list them."""

from __future__ import annotations

from vllm_compile_ext.cuda_graphs.policy import FULL, PIECEWISE, Shape

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def decode(tokens: int) -> Shape:
    return Shape(FULL, tokens, f"decode {tokens}")


def mixed(tokens: int) -> Shape:
    return Shape(PIECEWISE, tokens, f"mixed {tokens}")


DECODE = [decode(size) for size in SIZES]
MIXED = [mixed(size) for size in SIZES]
# Largest first, as upstream captures them.
ALL = MIXED[::-1] + DECODE[::-1]


def fits(best: Shape, captured: set[Shape]) -> list[Shape]:
    """The captured shapes that a batch fits in for which stock has `best`: a prompt fits in no decode graph."""
    return [s for s in captured if s.tokens >= best.tokens and (best.kind == FULL or s.kind == PIECEWISE)]
