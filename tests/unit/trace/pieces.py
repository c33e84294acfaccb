"""Pieces made by hand, from a description that a strategy can vary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

from vllm_compile_ext.trace.fingerprint import fingerprint
from vllm_compile_ext.trace.split import Piece


class World:
    """Symbols and fake tensors of one trace.  `name` goes into the names of symbols."""

    def __init__(self, name: str = "s") -> None:
        self.name = name
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.symbols: dict[str, Any] = {}

    def symbol(self, key: str, upper: int | None = None) -> Any:
        if key not in self.symbols:
            hint = 1009 + 2 * len(self.symbols)
            made = self.env.create_symbol(
                hint, ConstantSource(f"{self.name}{key}"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            if upper is not None:
                self.env.var_to_range[made] = ValueRanges(2, upper)
            self.symbols[key] = self.env.create_symintnode(made, hint=hint)
        return self.symbols[key]

    def tensor(self, shape: Sequence[Any], stride: Sequence[Any] | None = None, offset: int = 0, **kw: Any) -> Any:
        """A fake tensor; sizes that are strings are symbols, "a*2" twice one."""
        sizes = [self.size(s) for s in shape]
        with self.mode:
            if stride is None:
                return torch.empty(sizes, **kw)
            if offset:
                whole = torch.empty(100000, **kw)
                return whole.as_strided(sizes, stride, offset)
            return torch.empty_strided(sizes, stride, **kw)

    def size(self, s: Any) -> Any:
        if not isinstance(s, str):
            return s
        key, _, times = s.partition("*")
        return self.symbol(key) * int(times) if times else self.symbol(key)


def piece(inputs: Sequence[Any], build: Callable[[fx.Graph, list[fx.Node]], list[fx.Node]], name: str = "x") -> Piece:
    graph = fx.Graph()
    placeholders = []
    for i, value in enumerate(inputs):
        node = graph.placeholder(f"{name}{i}")
        node.meta["example_value"] = value
        placeholders.append(node)
    outputs = build(graph, placeholders)
    return Piece(False, [n for n in graph.nodes if n.op != "placeholder"], placeholders, outputs)


def digest(inputs: Sequence[Any], build: Callable[..., Any], *, extra: Sequence[str] = (), name: str = "x") -> str:
    return fingerprint(piece(inputs, build, name), nn.Module(), extra)
