"""What the Tracer leaves for `stitch`: bodies that were traced, and calls of them that were not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

CALL = "vllm_compile_ext.call"  # in a marker node's meta: its Call


class NotOnce(Exception):  # noqa: N818 - an answer, not an error
    """This call, or this graph, cannot share a trace; the message says why."""


def region(*args: Any) -> tuple[Any, ...]:
    """The target of a marker node: `args` are the call's tensors.  Only `stitch` knows what it stands for."""
    raise RuntimeError("a region marker was not stitched")


def keep_alive(*args: Any) -> None:
    """The end of a body.  Results that the traced layer's caller ignores must stay: a copy's may be used."""


@dataclass
class Opaque:
    """A graph input made by `ctor(*args)`, such as a layer name.

    `origins[i]` says where argument i was read: (owner, key) of the attribute, None for a constant.
    """

    ctor: Callable[..., Any]
    args: tuple[Any, ...]
    origins: tuple[tuple[Any, Any] | None, ...]


@dataclass
class Body:
    """What one traced call added to the graph.

    `args` are the nodes of the tensors it was called with, `outputs` describes what it returned (see signature.py),
    `inputs` has the placeholders it reads: to a real tensor, an Opaque, or None when every copy reads the same one.
    `state` is Python's state while it was traced (see state.py).
    """

    layer: torch.nn.Module
    signature: Any
    nodes: list[fx.Node]
    args: list[fx.Node]
    state: Any
    outputs: Any = None
    inputs: dict[fx.Node, torch.Tensor | Opaque | None] = field(default_factory=dict)


@dataclass
class Call:
    """One call that was not traced.  `source` is the layer's access expression over L, the locals of the traced frame.

    `tensors`: id of a tensor of the body's layer -> (access path below the layer, the tensor of this layer).
    `lifted`: placeholder of the body -> (arguments of its constructor for this layer, expression of what differs).
    """

    body: Body
    layer: torch.nn.Module
    source: str
    tensors: dict[int, tuple[str, torch.Tensor]]
    lifted: dict[fx.Node, tuple[tuple[Any, ...], str]] = field(default_factory=dict)


@dataclass
class Extra:
    """A graph input that Dynamo's bytecode does not pass.

    A tensor: `expression` over L finds it, `value` is what it finds now.  An opaque object, where `ctor` (module, name)
    is set: `ctor(*args)` makes an equal one, and `expression` says what it differs by.
    """

    node: fx.Node
    expression: str
    value: Any
    ctor: tuple[str, str] | None = None
    args: tuple[Any, ...] = ()
