"""What a call passes and returns, in terms that compare equal between calls which may share a trace.

A description is a nested tuple.  Arguments: ("tensor", class, number, metadata), ("sym", expression),
("const", type, value), ("tuple", class, items).  Results: ("arg", number), ("node", node), ("const", value),
("seq", class, items).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor

from vllm_compile_ext.trace.bodies import NotOnce
from vllm_compile_ext.trace.values import atom, is_atom


def expression(value: Any) -> str:
    """A size, stride or scalar as text: the symbolic expression where it is one."""
    return str(value.node.expr) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else repr(value)


def metadata(value: torch.Tensor) -> tuple[Any, ...]:
    """What a trace can see of a fake tensor: class, dtype, sizes and strides in elements, device, ..."""
    return (
        type(value).__name__,
        value.dtype,
        tuple(map(expression, value.shape)),
        tuple(map(expression, value.stride())),
        expression(value.storage_offset()),
        value.device,
        value.requires_grad,
        value.layout,
        value.is_conj(),
        value.is_neg(),
    )


def storage(node: fx.Node) -> int | None:
    """Identity of the storage of a node's fake tensor, None when it has none."""
    value = node.meta.get("example_value")
    try:
        return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
    except NotImplementedError:  # as under vmap
        return None


class Arguments:
    """The arguments of one call: `signature` to compare, the `nodes` of its tensors in order, their `variables`.

    Raises `NotOnce` when there is one of a kind that cannot be described.
    """

    def __init__(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.nodes: list[fx.Node] = []
        self.variables: list[Any] = []
        self.effects = tx.output.side_effects
        self.tx = tx
        # The tensors from outside of the trace among `nodes`, None for those that the trace made.
        self.real: list[torch.Tensor | None] = []
        described = (tuple(map(self._one, args)), tuple((k, self._one(v)) for k, v in kwargs.items()))
        storages = [storage(n) for n in self.nodes]
        if None in storages:
            raise NotOnce("an argument is a tensor without a storage")
        aliases = tuple(storages.index(s) for s in storages)
        self.signature = (described, aliases)

    def _one(self, variable: Any) -> Any:
        from torch._dynamo import variables as kinds

        v = variable.realize()
        if isinstance(v, kinds.TensorVariable):
            if self.effects.store_attr_mutations.get(v):
                raise NotOnce("an argument is a tensor with attributes set while tracing")
            node = v.as_proxy().node
            fake = node.meta["example_value"]
            if getattr(fake, "constant", None) is not None:
                raise NotOnce("an argument is a tensor whose value the trace knows")
            if node not in self.nodes:
                self.nodes.append(node)
                self.variables.append(v)
                self.real.append(self._real(v))
            number = self.nodes.index(node)
            kind = getattr(v, "class_type", None)
            return ("tensor", type(v).__name__, kind, number, metadata(fake))
        if isinstance(v, kinds.SymNodeVariable):
            return ("sym", expression(v.sym_num))
        if isinstance(v, kinds.ConstantVariable):
            return ("const", atom(v.value) if is_atom(v.value) else (type(v.value), repr(v.value)))
        if type(v) is kinds.TupleVariable:
            return ("tuple", tuple(map(self._one, v.items)))
        raise NotOnce(f"an argument is a {type(v).__name__}")

    def _real(self, variable: Any) -> torch.Tensor | None:
        if variable.source is None:
            return None
        try:
            value = self.tx.output.resolve_source_value(variable.source)
        except Exception as error:
            raise NotOnce(f"an argument, {variable.source.name}, cannot be found") from error
        if not isinstance(value, torch.Tensor):
            raise NotOnce(f"an argument is a {type(value).__name__} that is a graph input")
        return value


def results(variable: Any, nodes: set[fx.Node], args: list[fx.Node]) -> Any:
    """The description of what a body returned.  Raises `NotOnce` when a later call cannot return the like of it."""
    from torch._dynamo import variables as kinds

    v = variable.realize()
    if isinstance(v, kinds.TensorVariable):
        node = v.as_proxy().node
        if node in args:
            return ("arg", args.index(node))
        if node not in nodes:
            raise NotOnce("returns a tensor from outside")
        if type(v) is not kinds.TensorVariable:
            raise NotOnce(f"returns a {type(v).__name__}")
        return ("node", node)
    if isinstance(v, kinds.ConstantVariable):
        return ("const", v.value)
    if type(v) in (kinds.TupleVariable, kinds.ListVariable) and v.source is None:
        return ("seq", type(v), [results(i, nodes, args) for i in v.items])
    raise NotOnce(f"returns a {type(v).__name__}")


def returned(outputs: Any) -> list[fx.Node]:
    """The body's own nodes among its results, each once, in order."""

    def visit(o: Any) -> Iterator[fx.Node]:
        if o[0] == "node":
            yield o[1]
        elif o[0] == "seq":
            for i in o[2]:
                yield from visit(i)

    return list(dict.fromkeys(visit(outputs)))


def check_returned(outputs: list[fx.Node], others: list[fx.Node]) -> None:
    """Raises `NotOnce` unless each result can be stood in for by a new tensor: no view of another one, no gradient."""
    taken = {storage(n) for n in others}
    for node in outputs:
        value = node.meta.get("example_value")
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
