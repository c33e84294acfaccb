"""The oracle: is a stitched graph the one that tracing every layer gives?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from vllm_compile_ext.trace.signature import metadata


def difference(a: fx.Graph, a_inputs: Sequence[Any], b: fx.Graph, b_inputs: Sequence[Any]) -> str | None:
    """The first difference between two graphs, None when they are the same: node for node, with the metadata of values.

    Placeholders correspond when their values (`a_inputs`, `b_inputs`, real ones, in order) are the same objects, or
    equal where they are not tensors.  For a stitched graph that is Dynamo's inputs, then the extras' values.  A size is
    its expression, whichever node has it: Dynamo merges equal ones when it finishes a graph.
    """
    values: dict[Any, fx.Node] = {}
    theirs: dict[fx.Node, fx.Node] = {}  # two inputs of one value are one
    for node, value in zip(b.find_nodes(op="placeholder"), b_inputs, strict=True):
        first = values.setdefault(_key(value, node), node)
        theirs[node] = first
    env: dict[fx.Node, fx.Node] = {}
    for node, value in zip(a.find_nodes(op="placeholder"), a_inputs, strict=True):
        found = values.get(_key(value, node))
        if found is not None:
            env[node] = found
        elif node.users:
            return f"no input for {node.name}"
    left, right = ([n for n in g.nodes if n.op != "placeholder" and _size(n) is None] for g in (a, b))
    for x, y in zip(left, right, strict=False):
        if (x.op, x.target) != (y.op, y.target):
            return f"{x.format_node()} / {y.format_node()}"
        env[x] = y
        if _words(x, env) != _words(y, theirs):
            return f"{x.format_node()} / {y.format_node()}"
        if (mine := _meta(x.meta.get("example_value"))) != (other := _meta(y.meta.get("example_value"))):
            return f"{x.name}: {mine} / {other}"
    if len(left) != len(right):
        return f"{len(left)} nodes / {len(right)}"
    return None


def _key(value: Any, node: fx.Node) -> Any:
    value = getattr(value, "real_obj", value)
    if isinstance(value, torch.SymInt):
        return ("symbol", node.target)
    return id(value) if isinstance(value, torch.Tensor) else (type(value), value)


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return metadata(value)
    if isinstance(value, tuple | list):
        return tuple(map(_meta, value))
    return str(value)


def _size(node: fx.Node) -> str | None:
    """The expression of a node that is a size of the inputs, None for any other node."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.SymInt) or free_unbacked_symbols(value):
        return None
    return f"size {value.node.expr}"


def _words(node: fx.Node, env: dict[fx.Node, fx.Node]) -> Any:
    """The arguments of a node: other nodes by what they correspond to, sizes by what they are."""
    found = fx.node.map_arg((node.args, node.kwargs), lambda n: _Word(_size(n) or env.get(n, n)))
    return repr(found)


class _Word:
    """What stands for a node among arguments."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return self.value if isinstance(self.value, str) else f"{self.value.name} {id(self.value)}"
