"""Replace each marker that the Tracer left by a copy of the body it stands for, with the layer's own tensors.

`difference` compares a stitched graph with the one that tracing every layer gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._library.fake_class_registry import FakeScriptObject
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from vllm_compile_ext.trace.call import (
    CALL,
    Body,
    Call,
    NotOnce,
    Opaque,
    keep_alive,
    metadata,
    region,
    storage,
    value_of,
)

STORAGE = "vllm_compile_ext.storage"  # in a node's meta: number of its storage, equal where tensors may overlap


@dataclass
class Extra:
    """A graph input that Dynamo's bytecode does not pass.

    A tensor: `expression` over L finds it, `value` is what it finds now.  An opaque object, where `ctor` (module, name)
    is set: `ctor(*args)` makes an equal one.
    """

    node: fx.Node
    expression: str
    value: Any
    ctor: tuple[str, str] | None = None
    args: tuple[Any, ...] = ()


def stitch(graph: fx.Graph, inputs: Sequence[Any]) -> list[Extra]:
    """Stitch `graph` in place.  `inputs` are the values of its placeholders.

    Returns the placeholders that it added, in order, after Dynamo's own.  Raises `NotOnce` when a body is not what it
    was while it was traced; the graph is then of no use, and the model must be traced again without a Tracer.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    if len(placeholders) != len(inputs):
        raise NotOnce(f"{len(placeholders)} placeholders, {len(inputs)} inputs")
    work = _Stitch(graph, placeholders, inputs)
    for marker in graph.find_nodes(op="call_function", target=region):
        work.replace(marker)
    for node in list(graph.find_nodes(op="call_function", target=keep_alive)):
        graph.erase_node(node)
    return work.extras


class _Stitch:
    def __init__(self, graph: fx.Graph, placeholders: list[fx.Node], inputs: Sequence[Any]) -> None:
        self.graph = graph
        self.extras: list[Extra] = []
        self.last = placeholders[-1] if placeholders else None
        self.by_tensor = {id(v): n for n, v in zip(placeholders, inputs, strict=True) if isinstance(v, torch.Tensor)}
        self.replaced: dict[fx.Node, fx.Node] = {}
        # Copies share their body's fake tensors, so the storages of these cannot tell which tensors overlap.
        self.numbers = itertools.count()
        self.real: dict[int, int] = {}  # real storage -> its number
        fakes: dict[int, int] = {}
        for node, value in zip(placeholders, inputs, strict=True):
            if isinstance(value, torch.Tensor):
                node.meta[STORAGE] = self._number(value)
                if (fake := storage(node)) is not None:
                    fakes.setdefault(fake, node.meta[STORAGE])
        self.members: dict[int, list[fx.Node]] = {}  # number of a storage -> nodes that are in it
        for node in graph.nodes:
            if STORAGE not in node.meta and (fake := storage(node)) is not None:
                if fake not in fakes:
                    fakes[fake] = next(self.numbers)
                node.meta[STORAGE] = fakes[fake]
                self.members.setdefault(fakes[fake], []).append(node)

    def replace(self, marker: fx.Node) -> None:
        call: Call | None = marker.meta.get(CALL)
        if call is None:
            raise NotOnce("a marker has lost its call")
        body = call.body
        self._refresh(body)
        if len(marker.args) != len(body.args):
            raise NotOnce(f"a marker of {call.source} has lost arguments")
        env: dict[fx.Node, Any] = dict(zip(body.args, marker.args, strict=True))
        own = {*body.nodes, *body.args}
        for source in dict.fromkeys(n for node in body.nodes for n in node.all_input_nodes):
            if source not in own:
                env[source] = self._input(call, source)
        storages = {key: new.meta.get(STORAGE) for old, new in env.items() if (key := storage(old)) is not None}
        with self.graph.inserting_before(marker):
            for node in body.nodes:
                copy = env[node] = self.graph.node_copy(node, lambda n: env[n])
                copy.meta.pop(STORAGE, None)
                if (key := storage(node)) is not None:
                    if storages.get(key) is None:
                        storages[key] = next(self.numbers)
                    copy.meta[STORAGE] = storages[key]
        for user in list(marker.users):
            if user.op != "call_function" or len(user.args) != 2 or not isinstance(user.args[1], int):
                raise NotOnce(f"{user.name} uses a marker as a whole")
            result = env[body.results[user.args[1]]]
            # Views that were taken of a stand-in are views of what it stood for.
            old, new = user.meta.get(STORAGE), result.meta.get(STORAGE)
            if old is not None and old != new:
                moved = self.members.pop(old, [])
                for node in moved:
                    node.meta[STORAGE] = new
                self.members.setdefault(new, []).extend(moved)
            self.replaced[user] = result
            user.replace_all_uses_with(result)
            self.graph.erase_node(user)
        self.graph.erase_node(marker)

    def _refresh(self, body: Body) -> None:
        """A body traced after stamped calls names their results, which have been replaced since; and Dynamo has erased
        nodes that nothing used (`keep_alive` holds every result)."""

        def current(node: fx.Node) -> fx.Node:
            while node in self.replaced:
                node = self.replaced[node]
            return node

        body.args = list(map(current, body.args))
        body.inputs = {current(n): v for n, v in body.inputs.items()}
        body.nodes = [n for n in body.nodes if not n._erased]
        if any(n._erased for n in (*body.args, *body.results)):
            raise NotOnce("Dynamo has erased an argument or a result of a body")
        if any(n.graph is not self.graph for n in body.nodes):
            raise NotOnce("a body is in another graph")

    def _input(self, call: Call, source: fx.Node) -> fx.Node:
        """What the copy reads for a node from outside of the body."""
        if source not in call.body.inputs:
            # Dynamo rewires sizes when it finishes a graph.
            if not isinstance(value_of(source), torch.SymInt):
                raise NotOnce(f"the body of {call.source} uses {source.name}, which it did not when it was traced")
            return source
        what = call.body.inputs[source]
        if isinstance(what, Opaque) and source in call.lifted:
            args, ctor = call.lifted[source], (what.ctor.__module__, what.ctor.__qualname__)
            return self._placeholder(source, call.source, what.ctor(*args), ctor, args)
        if isinstance(what, torch.Tensor) and id(what) in call.tensors:
            path, value = call.tensors[id(what)]
            if id(value) not in self.by_tensor:
                node = self.by_tensor[id(value)] = self._placeholder(source, call.source + path, value)
                node.meta[STORAGE] = self._number(value)
            return self.by_tensor[id(value)]
        return source

    def _number(self, tensor: torch.Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        if key not in self.real:
            self.real[key] = next(self.numbers)
        return self.real[key]

    def _placeholder(self, like: fx.Node, expression: str, value: Any, *made: Any) -> fx.Node:
        before = self.graph.inserting_after(self.last) if self.last is not None else self.graph.inserting_before()
        with before:
            node = self.graph.placeholder(f"{like.name}_of_{len(self.extras)}")
        node.meta.update({k: v for k, v in like.meta.items() if k in ("example_value", "tensor_dict")})
        fake = value_of(node)
        if isinstance(fake, FakeScriptObject):
            # Tracing a piece tells opaque inputs apart by their objects: two layers' names must not share one.
            node.meta["example_value"] = FakeScriptObject(fake.wrapped_obj, fake.script_class_name, value)
        self.extras.append(Extra(node, expression, value, *made))
        self.last = node
        return node


def difference(a: fx.Graph, a_inputs: Sequence[Any], b: fx.Graph, b_inputs: Sequence[Any]) -> str | None:
    """The first difference between two graphs, None when they are the same: node for node, with the metadata of values.

    Placeholders correspond when their values (`a_inputs`, `b_inputs`, real ones, in order) are the same objects, or
    equal where they are not tensors.  For a stitched graph that is Dynamo's inputs, then the extras' values.  A size is
    its expression, whichever node has it: Dynamo merges equal ones when it finishes a graph.
    """
    words: dict[fx.Node, str] = {}  # what a node is called in both graphs
    inputs: dict[Any, str] = {}
    for node, value in zip(b.find_nodes(op="placeholder"), b_inputs, strict=True):
        words[node] = inputs.setdefault(_key(value, node), f"input {len(inputs)}")  # two inputs of one value are one
    for node, value in zip(a.find_nodes(op="placeholder"), a_inputs, strict=True):
        if (key := _key(value, node)) in inputs:
            words[node] = inputs[key]
        elif node.users:
            return f"no input for {node.name}"
    left, right = ([n for n in g.nodes if n.op != "placeholder" and _size(n) is None] for g in (a, b))
    for number, (x, y) in enumerate(zip(left, right, strict=False)):
        words[x] = words[y] = f"node {number}"
        if (x.op, x.target, _arguments(x, words)) != (y.op, y.target, _arguments(y, words)):
            return f"{x.format_node()} / {y.format_node()}"
        if (mine := _meta(value_of(x))) != (other := _meta(value_of(y))):
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
    return tuple(map(_meta, value)) if isinstance(value, tuple | list) else str(value)


def _size(node: fx.Node) -> str | None:
    """The expression of a node that is a size of the inputs, None for any other node."""
    value = value_of(node)
    if not isinstance(value, torch.SymInt) or free_unbacked_symbols(value):
        return None
    return f"size {value.node.expr}"


class _Word(str):
    __slots__ = ()
    __repr__ = str.__str__  # without quotes: no constant looks like it


def _arguments(node: fx.Node, words: dict[fx.Node, str]) -> str:
    """The arguments of a node as text: other nodes by what they are called, sizes by what they are."""
    return repr(
        fx.node.map_arg((node.args, node.kwargs), lambda n: _Word(_size(n) or words.get(n, f"unknown {id(n)}")))
    )
