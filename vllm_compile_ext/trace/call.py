"""A call of a layer as data: what it passes and returns, the state it is made in, and the marker that stands for it.

Descriptions are nested tuples that compare equal between calls which may share a trace.  Of an argument:
("tensor", variable's class, Python class, number, metadata), ("sym", expression), ("const", type, value),
("tuple", items).  Of a result: ("arg", number), ("node", node), ("const", value), ("seq", class, items).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor

from vllm_compile_ext.trace.values import atom, is_atom

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

    args: the nodes of the tensors it was called with.  outputs: the description of what it returned; results: its own
    nodes in that, each once, in order.  inputs: the placeholders it reads, each with its tensor or Opaque, or None
    where every copy reads the same one.
    """

    layer: torch.nn.Module
    nodes: list[fx.Node]
    args: list[fx.Node]
    outputs: Any = None
    results: list[fx.Node] = field(default_factory=list)
    inputs: dict[fx.Node, torch.Tensor | Opaque | None] = field(default_factory=dict)


@dataclass
class Call:
    """A call that was not traced.  `source` is the layer's access expression over L, the locals of the traced frame.

    `tensors`: id of a tensor of the body's layer -> (access path below the layer, the tensor of this layer).
    `lifted`: placeholder of the body -> the arguments that its constructor gets for this layer.
    """

    body: Body
    source: str
    tensors: dict[int, tuple[str, torch.Tensor]]
    lifted: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)


def expression(size: Any) -> str:
    """A size, stride or scalar as text: the symbolic expression where it is one."""
    return str(size.node.expr) if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else repr(size)


def metadata(fake: torch.Tensor) -> tuple[Any, ...]:
    """What a trace can see of a fake tensor: class, dtype, sizes and strides in elements, device, ..."""
    return (
        type(fake).__name__,
        fake.dtype,
        tuple(map(expression, fake.shape)),
        tuple(map(expression, fake.stride())),
        expression(fake.storage_offset()),
        fake.device,
        fake.requires_grad,
        fake.layout,
        fake.is_conj(),
        fake.is_neg(),
    )


def value_of(node: fx.Node) -> Any:
    """The fake tensor or symbol that a node stands for."""
    return node.meta.get("example_value")


def storage(node: fx.Node) -> int | None:
    """Identity of the storage of a node's fake tensor, None when it has none."""
    value = value_of(node)
    try:
        return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
    except NotImplementedError:  # as under vmap
        return None


def resolve(tx: Any, source: Any, default: Any = None) -> Any:
    """The value that a source leads to; `default` where there is none, or the source is of Dynamo's own making."""
    with contextlib.suppress(Exception):
        return default if source is None else tx.output.resolve_source_value(source)
    return default


class Arguments:
    """The arguments of a call: their description, and the nodes, Dynamo's variables and real values of the tensors.

    real: None for a tensor that the trace made.  Raises `NotOnce` for an argument that cannot be described.
    """

    def __init__(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.tx = tx
        self.nodes: list[fx.Node] = []
        self.variables: list[Any] = []
        self.real: list[torch.Tensor | None] = []
        described = (tuple(map(self._describe, args)), tuple((k, self._describe(v)) for k, v in kwargs.items()))
        storages = [storage(n) for n in self.nodes]
        if None in storages:
            raise NotOnce("an argument is a tensor without a storage")
        self.description = (described, tuple(storages.index(s) for s in storages))  # which of them share memory

    def _describe(self, variable: Any) -> Any:
        from torch._dynamo import variables as kinds

        v = variable.realize()
        if isinstance(v, kinds.TensorVariable):
            node = v.as_proxy().node
            fake = value_of(node)
            if self.tx.output.side_effects.store_attr_mutations.get(v):
                raise NotOnce("an argument is a tensor with attributes set while tracing")
            if getattr(fake, "constant", None) is not None:
                raise NotOnce("an argument is a tensor whose value the trace knows")
            if node not in self.nodes:
                self.nodes.append(node)
                self.variables.append(v)
                self.real.append(self._find(v.source))
            return ("tensor", type(v).__name__, getattr(v, "class_type", None), self.nodes.index(node), metadata(fake))
        if isinstance(v, kinds.SymNodeVariable):
            return ("sym", expression(v.sym_num))
        if isinstance(v, kinds.ConstantVariable):
            return ("const", atom(v.value) if is_atom(v.value) else (type(v.value), repr(v.value)))
        if type(v) is kinds.TupleVariable:
            return ("tuple", tuple(map(self._describe, v.items)))
        raise NotOnce(f"an argument is a {type(v).__name__}")

    def _find(self, source: Any) -> torch.Tensor | None:
        value = resolve(self.tx, source)
        if source is not None and not isinstance(value, torch.Tensor):
            raise NotOnce(f"an argument is a graph input that is found as no tensor, {source.name}")
        return value


def describe_results(variable: Any, body: Body) -> Any:
    """The description of what a body returned; notes the body's own nodes among it.  Raises `NotOnce` when a later call
    cannot return the like of it."""
    from torch._dynamo import variables as kinds

    v = variable.realize()
    if isinstance(v, kinds.TensorVariable):
        node = v.as_proxy().node
        if node in body.args:
            return ("arg", body.args.index(node))
        if node not in body.nodes:
            raise NotOnce("returns a tensor from outside")
        if type(v) is kinds.TensorVariable:
            if node not in body.results:
                body.results.append(node)
            return ("node", node)
    if isinstance(v, kinds.ConstantVariable):
        return ("const", v.value)
    if type(v) in (kinds.TupleVariable, kinds.ListVariable) and v.source is None:
        return ("seq", type(v), [describe_results(item, body) for item in v.items])
    raise NotOnce(f"returns a {type(v).__name__}")


def check_results(body: Body) -> None:
    """Raises `NotOnce` unless a new tensor can stand in for each result: no view of another one, no gradient."""
    taken = {storage(n) for n in (*body.args, *body.inputs)}
    for node in body.results:
        value = value_of(node)
        if type(value) is not FakeTensor or value.layout != torch.strided or value.is_conj() or value.is_neg():
            raise NotOnce(f"returns a tensor of kind {type(value).__name__}")
        if value.requires_grad:
            raise NotOnce("returns a tensor that needs a gradient")
        if storage(node) in taken or value.storage_offset() != 0:
            raise NotOnce("returns a view")
        taken.add(storage(node))


def first_difference(a: Any, b: Any) -> str:
    """Where two descriptions differ, for people."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return next((first_difference(x, y) for x, y in zip(a, b, strict=True) if x != y), "nothing")
    return f"{a} / {b}"


class State:
    """What the trace has changed of Python's objects so far, and the state of torch.

    Dynamo keeps the changes beside the objects (torch 2.13, _dynamo/side_effects.py).  States are equal when they hold
    the same changes, each to an equal constant or the same tensor; a change to anything else equals nothing.  An
    attribute, or the items of a list, that were put back to the constants that they were are not changed.
    """

    def __init__(self, tx: Any) -> None:
        from torch._dynamo.source import AttrSource
        from torch._dynamo.variables import ListVariable
        from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationExisting, ValueMutationNew

        new = AttributeMutationNew | ValueMutationNew  # reachable from the model only by a change that is listed itself
        effects = tx.output.side_effects
        self.changes: list[tuple[str, int, Any]] = []
        self.keep: list[Any] = []  # whose ids are compared

        def add(variable: Any, step: str, value: Any) -> None:
            self.changes.append((f"{_name(variable)}{step}", id(variable), value))
            self.keep.append(variable)

        for variable, stored in effects.store_attr_mutations.items():
            if isinstance(variable.mutation_type, new):
                continue
            source = getattr(variable, "source", None)
            for name, stored_value in stored.items():
                value = self._comparable(stored_value)
                old = object() if source is None else resolve(tx, AttrSource(source, name), object())
                if not _is_same(old, value):
                    add(variable, f".{name}", value)
        for variable in effects.id_to_variable.values():
            kind = variable.mutation_type
            if isinstance(kind, ValueMutationExisting) and kind.is_modified:
                items = tuple(map(self._comparable, variable.items)) if type(variable) is ListVariable else None
                old = resolve(tx, variable.source)
                # vLLM's shared experts keep an output in a list for a moment, and put the None back.
                if items is None:
                    add(variable, "", object())
                elif type(old) is not list or len(old) != len(items) or not all(map(_is_same, old, items)):
                    add(variable, "", items)
            elif not isinstance(kind, new) and getattr(variable, "is_base_vt_modified", lambda _: False)(effects):
                add(variable, "", object())  # a subclass of dict, list or set was changed as such
        self.counts = (len(effects.tensor_hooks), len(effects.save_for_backward), len(tx.output.random_calls))
        self.torch = _state_of_torch(tx)

    def _comparable(self, variable: Any) -> Any:
        """What stands for a stored value when states are compared."""
        from torch._dynamo.variables import ConstantVariable
        from torch._dynamo.variables.lazy import LazyVariableTracker

        value: Any = object()
        if isinstance(variable, LazyVariableTracker) and not variable.is_realized():
            value = variable.peek_value()  # adds no guard
        else:
            variable = variable.realize()
            if isinstance(variable, ConstantVariable):
                value = variable.value
            elif variable.is_tensor():
                self.keep.append(variable)
                return id(variable)
        return (type(value), repr(value)) if type(value) in (int, float, str, bool, type(None)) else object()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return (self.changes, self.counts, self.torch) == (other.changes, other.counts, other.torch)

    __hash__ = None  # type: ignore[assignment]

    def since(self, earlier: State) -> str:
        """What was changed since `earlier`, for people."""
        names = [change[0] for change in self.changes if change not in earlier.changes]
        names += [str(now) for now, before in zip(self.torch, earlier.torch, strict=True) if now != before]
        return ", ".join(names[:3]) or "a hook, a saved tensor or a random number"


def _is_same(old: Any, comparable: Any) -> bool:
    """Whether `old` is the constant that `State._comparable` stands for; nothing else is printed, which runs code."""
    return isinstance(comparable, tuple) and type(old) is comparable[0] and repr(old) == comparable[1]


def _name(variable: Any) -> str:
    try:
        return str(variable.source.name)
    except (AttributeError, NotImplementedError):  # no source, or one of Dynamo's own making
        return type(variable).__name__


def _state_of_torch(tx: Any) -> tuple[Any, ...]:
    """The state of torch that a trace may read, as Dynamo itself guards it, and the contexts that are open.

    Raises `NotOnce` under a torch function mode.  `GlobalStateGuard` (torch 2.13, csrc/dynamo/guards.cpp) has grad
    mode, autocast, the default dtype, TF32, reduced precision, deterministic algorithms and the number of threads.
    """
    from torch._C._dynamo.guards import GlobalStateGuard
    from torch.fx import traceback
    from torch.utils._device import DeviceContext

    functions = tx.symbolic_torch_function_state
    for mode in functions.mode_stack:
        if not isinstance(getattr(mode, "value", None), DeviceContext):
            raise NotOnce(f"called under a torch function mode, {type(getattr(mode, 'value', mode)).__name__}")
    contexts: list[tuple[str, str]] = []
    frame = tx
    while frame is not None:
        opened = [block.with_context for block in frame.block_stack if block.with_context is not None]
        contexts += [(type(c).__name__, repr(getattr(c, "target_values", None))) for c in opened]
        frame = getattr(frame, "parent", None)
    return (
        GlobalStateGuard().__getstate__(),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch._C._len_torch_dispatch_stack(),
        len(functions.mode_stack),
        functions.torch_function_subclass_enabled,
        functions.torch_function_mode_enabled,
        repr(traceback.current_meta.get("custom")),
        tuple(contexts),
    )


_SYMBOLIC = torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool


def check_symbols(body: Body) -> None:
    """Raises `NotOnce` when the body makes sizes (`nonzero` and the like do): each copy would need its own."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def symbols(nodes: Iterable[fx.Node]) -> Any:
        return free_unbacked_symbols([v for v in map(value_of, nodes) if isinstance(v, _SYMBOLIC)])

    known = symbols((*body.args, *body.inputs))
    for node in body.nodes:
        if symbols([node]) - known:
            raise NotOnce(f"makes a size that depends on data, {node.name}")
