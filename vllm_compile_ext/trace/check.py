"""The oracle: is a stitched graph the one that tracing every layer gives?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext.trace.signature import metadata


def difference(a: fx.Graph, a_inputs: Sequence[Any], b: fx.Graph, b_inputs: Sequence[Any]) -> str | None:
    """The first difference between two graphs, None when they are the same: node for node, with the metadata of values.

    Placeholders correspond when their values (`a_inputs`, `b_inputs`, real ones, in order) are the same objects, or
    equal where they are not tensors.  For a stitched graph that is Dynamo's inputs, then the extras' values.
    """
    values: dict[Any, fx.Node] = {}
    for node, value in zip(b.find_nodes(op="placeholder"), b_inputs, strict=True):
        values.setdefault(_key(value, node), node)
    env: dict[fx.Node, fx.Node] = {}
    for node, value in zip(a.find_nodes(op="placeholder"), a_inputs, strict=True):
        found = values.get(_key(value, node))
        if found is not None:
            env[node] = found
        elif node.users:
            return f"no input for {node.name}"
    left, right = ([n for n in g.nodes if n.op != "placeholder"] for g in (a, b))
    for x, y in zip(left, right, strict=False):
        if (x.op, x.target) != (y.op, y.target):
            return f"{x.format_node()} / {y.format_node()}"
        env[x] = y
        mine = fx.node.map_arg((x.args, x.kwargs), lambda n: env.get(n, n))
        if repr(mine) != repr((y.args, y.kwargs)) or [env.get(n) for n in x.all_input_nodes] != y.all_input_nodes:
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
