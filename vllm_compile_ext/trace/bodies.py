"""What the Tracer leaves for `stitch`: bodies that were traced, and calls of them that were not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext.trace.structure import Comparison

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
class Read:
    """One access of the trace: `key` (or `ANY`) of `owner` gave `value`.  `name` is for people.

    `owner` or `value` is `UNKNOWN` where Dynamo's source cannot be followed.  `direct`: the trace itself looked at it;
    else it is only on the way to something that the trace looked at.
    """

    name: str
    owner: Any
    key: Any
    value: Any
    direct: bool

    @functools.cached_property
    def inside(self) -> frozenset[int]:
        """ids of what is inside of `value`, a module or container.

        Dynamo does not record again a read from a container or module that it has gone through before.
        """
        found: dict[int, Any] = {}
        todo = [self.value]
        while todo:
            value = todo.pop()
            if isinstance(value, torch.nn.Module):
                parts: list[Any] = [
                    v for m in value.modules() for v in (m, *m._parameters.values(), *m._buffers.values())
                ]
                found.update((id(v), v) for v in parts)
            elif type(value) in (list, tuple, set, frozenset, dict):
                parts = [*value.keys(), *value.values()] if type(value) is dict else list(value)
                todo += [v for v in parts if id(v) not in found]
                found.update((id(v), v) for v in parts)
        return frozenset(found)


@dataclass
class Foreign:
    """A call of a function that ran while tracing (`torch.compiler.assume_constant_result`), with values or UNKNOWN.

    `variables` are Dynamo's for `args`.
    """

    fn: Callable[..., Any]
    args: list[Any]
    variables: list[Any]


UNKNOWN: Any = object()
ANY: Any = object()


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
    reads: list[Read]
    state: Any
    outputs: Any = None
    inputs: dict[fx.Node, torch.Tensor | Opaque | None] = field(default_factory=dict)


@dataclass
class Call:
    """One call that was not traced.  `source` is the layer's access expression over L, the locals of the traced frame.

    `lifted`: placeholder of the body -> (arguments of its constructor for this layer, expression of what differs).
    """

    body: Body
    layer: torch.nn.Module
    source: str
    comparison: Comparison
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
