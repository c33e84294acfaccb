"""Replace each marker that the Tracer left by a copy of the body it stands for, with the layer's own tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._library.fake_class_registry import FakeScriptObject

from vllm_compile_ext.trace import access
from vllm_compile_ext.trace.bodies import CALL, Body, Call, Extra, NotOnce, Opaque, keep_alive, region
from vllm_compile_ext.trace.signature import returned, storage

STORAGE = "vllm_compile_ext.storage"  # in a node's meta: number of its storage, equal where tensors may overlap


def stitch(graph: fx.Graph, inputs: Sequence[Any]) -> list[Extra]:
    """Stitch `graph` in place.  `inputs` are the values of its placeholders.

    The answer are its new placeholders, which follow Dynamo's own, in order.  Raises `NotOnce` when a body is not what
    it was while it was traced; the graph is then of no use, and the model must be traced again without a Tracer.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    if len(placeholders) != len(inputs):
        raise NotOnce(f"{len(placeholders)} placeholders, {len(inputs)} inputs")
    work = _Stitch(graph, placeholders, inputs)
    for marker in [n for n in graph.nodes if n.op == "call_function" and n.target is region]:
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
        # Copies share their template's fake tensors, so the storages of these cannot tell which tensors overlap.
        self.numbers: Iterator[int] = itertools.count()
        self.real: dict[int, int] = {}
        fake: dict[int, int] = {}
        for node, value in zip(placeholders, inputs, strict=True):
            if isinstance(value, torch.Tensor):
                node.meta[STORAGE] = self._number(value)
                if (key := storage(node)) is not None:
                    fake.setdefault(key, node.meta[STORAGE])
        self.members: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            if STORAGE not in node.meta and (key := storage(node)) is not None:
                node.meta[STORAGE] = fake[key] if key in fake else fake.setdefault(key, next(self.numbers))
                self.members.setdefault(node.meta[STORAGE], []).append(node)

    def _number(self, tensor: torch.Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        if key not in self.real:
            self.real[key] = next(self.numbers)
        return self.real[key]

    def _placeholder(self, like: fx.Node, extra: tuple[Any, ...]) -> fx.Node:
        before = self.graph.inserting_after(self.last) if self.last is not None else self.graph.inserting_before()
        with before:
            node = self.graph.placeholder(f"{like.name}_of_{len(self.extras)}")
        node.meta.update({k: v for k, v in like.meta.items() if k in ("example_value", "tensor_dict")})
        made = Extra(node, *extra)
        fake = node.meta.get("example_value")
        if isinstance(fake, FakeScriptObject):
            # Tracing a piece tells opaque inputs apart by their objects: two layers' names must not share one.
            node.meta["example_value"] = FakeScriptObject(fake.wrapped_obj, fake.script_class_name, made.value)
        self.extras.append(made)
        self.last = node
        return node

    def _resolve(self, node: fx.Node) -> fx.Node:
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def replace(self, marker: fx.Node) -> None:
        call: Call | None = marker.meta.get(CALL)
        if call is None:
            raise NotOnce("a marker has lost its call")
        body = call.body
        env = self._environment(call, marker)
        storages = {key: new.meta.get(STORAGE) for old, new in env.items() if (key := storage(old)) is not None}
        with self.graph.inserting_before(marker):
            for node in body.nodes:
                copy = env[node] = self.graph.node_copy(node, lambda n: env[n])
                copy.meta.pop(STORAGE, None)
                if (key := storage(node)) is not None:
                    if storages.get(key) is None:
                        storages[key] = next(self.numbers)
                    copy.meta[STORAGE] = storages[key]
        outs = returned(body.outputs)
        for user in list(marker.users):
            if user.op != "call_function" or len(user.args) != 2 or not isinstance(user.args[1], int):
                raise NotOnce(f"{user.name} uses a marker as a whole")
            out = env[outs[user.args[1]]]
            self._join(user, out)
            self.replaced[user] = out
            user.replace_all_uses_with(out)
            self.graph.erase_node(user)
        self.graph.erase_node(marker)

    def _join(self, stand_in: fx.Node, out: fx.Node) -> None:
        """Views that were taken of a stand-in are views of what it stood for."""
        old, new = stand_in.meta.get(STORAGE), out.meta.get(STORAGE)
        if old is None or old == new:
            return
        moved = self.members.pop(old, [])
        for node in moved:
            node.meta[STORAGE] = new
        self.members.setdefault(new, []).extend(moved)

    def _environment(self, call: Call, marker: fx.Node) -> dict[fx.Node, fx.Node]:
        """What the copy reads for each node from outside of the body."""
        body = call.body
        self._refresh(body)
        if len(marker.args) != len(body.args):
            raise NotOnce(f"a marker of {call.source} has lost arguments")
        env: dict[fx.Node, fx.Node] = dict(zip(body.args, marker.args, strict=True))
        inside = set(body.nodes)
        for source in dict.fromkeys(n for node in body.nodes for n in node.all_input_nodes):
            if source in inside or source in env:
                continue
            if source not in body.inputs:
                # Dynamo rewires sizes when it finishes a graph.
                if not isinstance(source.meta.get("example_value"), torch.SymInt):
                    raise NotOnce(f"the body of {call.source} uses {source.name}, which it did not when it was traced")
                env[source] = source
                continue
            env[source] = self._input(call, source, body.inputs[source])
        return env

    def _refresh(self, body: Body) -> None:
        """A body traced after stamped calls names their results, which have been replaced since; and Dynamo has erased
        nodes that nothing used (`keep_alive` holds every result)."""
        body.args = [self._resolve(n) for n in body.args]
        body.inputs = {self._resolve(n): v for n, v in body.inputs.items()}
        body.nodes = [n for n in body.nodes if not n._erased]
        if any(n._erased for n in (*body.args, *returned(body.outputs))):
            raise NotOnce("Dynamo has erased an argument or a result of a body")
        if any(n.graph is not self.graph for n in body.nodes):
            raise NotOnce("a body is in another graph")

    def _input(self, call: Call, source: fx.Node, what: torch.Tensor | Opaque | None) -> fx.Node:
        if what is None:
            return source
        if isinstance(what, Opaque):
            if source not in call.lifted:
                return source
            args, expression = call.lifted[source]
            ctor = (what.ctor.__module__, what.ctor.__qualname__)
            return self._placeholder(source, (expression, what.ctor(*args), ctor, args))
        found = call.tensors.get(id(what))
        if found is None:
            return source
        path, value = found
        access.steps(call.source + path)
        node = self.by_tensor.get(id(value))
        if node is None:
            node = self.by_tensor[id(value)] = self._placeholder(source, (call.source + path, value))
            node.meta[STORAGE] = self._number(value)
        return node
