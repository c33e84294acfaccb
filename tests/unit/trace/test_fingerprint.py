"""Pieces that differ in one respect never collide; pieces that differ in names always do."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.trace.capture import stitched
from tests.unit.trace.models import Name, named
from tests.unit.trace.pieces import World, digest, piece
from vllm_compile_ext.trace.fingerprint import Unfingerprintable, fingerprint
from vllm_compile_ext.trace.split import decompose_sizes, split

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

BINARY = [torch.add, torch.sub, torch.mul, torch.ops.aten.add.Tensor, torch.ops.aten.add, operator.add, "add", "mul"]
MUTATING = ["add_", "mul_", "sub_", torch.ops.aten.copy_.default]
UNARY = [torch.relu, torch.tanh, torch.nn.functional.relu, "exp", torch.ops.aten.relu.default]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CONSTANTS = [0, 0.0, -0.0, 1, 1.0, True, False, None, "1", 2, 2.0, 1e-5, float("inf"), float("nan"), (1,), [1], (1, 1)]
CONSTANTS += [
    (1.0,),
    ((1,),),
    slice(0, 1),
    slice(0, 1, 1),
    torch.float32,
    torch.int64,
    torch.device("cpu"),
    1j,
    b"1",
    ...,
]


@dataclass(frozen=True)
class Input:
    shape: tuple[Any, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    stride: tuple[int, ...] | None = None
    offset: int = 0
    grad: bool = False
    base: int | None = None  # number of the input that it is a view of


@dataclass(frozen=True)
class Op:
    target: Any
    args: tuple[int, ...]
    constants: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Description:
    inputs: tuple[Input, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    upper: int | None = None  # of the first symbol's range
    extra: tuple[str, ...] = ()
    opaque: str | None = None  # a layer's name, an input that the first op takes
    data: int | None = None  # a constant tensor that the last op takes

    def digest(self, world: str = "s", name: str = "x", prefix: str = "") -> str:
        w = World(world)
        if self.upper is not None:
            w.symbol("a", self.upper)
        values: list[Any] = []
        for i in self.inputs:
            if i.base is not None:
                with w.mode:
                    values.append(values[i.base].view_as(values[i.base]))
                continue
            made = w.tensor(i.shape, i.stride, i.offset, dtype=i.dtype, device=i.device)
            values.append(made.requires_grad_() if i.grad else made)
        if self.opaque is not None:
            values.append(Name(self.opaque))
        owner = nn.Module()
        if self.data is not None:
            setattr(owner, f"{name}_const", torch.tensor([self.data]))

        def build(graph: fx.Graph, placeholders: list[fx.Node]) -> list[fx.Node]:
            nodes = placeholders[: len(self.inputs)]
            for n, op in enumerate(self.ops):
                args = [*(nodes[a] for a in op.args), *op.constants]
                if n == 0 and self.opaque is not None:
                    args.append(placeholders[-1])
                if n == len(self.ops) - 1 and self.data is not None:
                    args.append(graph.get_attr(f"{name}_const"))
                make = graph.call_method if isinstance(op.target, str) else graph.call_function
                made = make(op.target, tuple(args), dict(op.keywords))
                made.name = f"{prefix}{made.name}"
                made.meta["example_value"] = values[0]
                nodes.append(made)
            return [nodes[o] for o in self.outputs]

        return fingerprint(piece(values, build, name), owner, self.extra)


sizes = st.sampled_from(["a", "b", "a*2", 4, 8, 16])
inputs_ = st.builds(Input, st.tuples(sizes, st.sampled_from([4, 8])), st.sampled_from(DTYPES))


@st.composite
def descriptions(draw: Any) -> Description:
    inputs = tuple(draw(st.lists(inputs_, min_size=2, max_size=4)))
    ops: list[Op] = []
    for n in range(draw(st.integers(2, 5))):
        nodes = st.integers(0, len(inputs) + n - 1)
        target = draw(st.sampled_from([*BINARY, *MUTATING, *UNARY]))
        args = (draw(nodes),) if target in UNARY else (draw(nodes), draw(nodes))
        keywords = draw(st.sampled_from([(), (("alpha", 2),), (("alpha", 2.0),)]))
        ops.append(Op(target, args, (draw(st.sampled_from(CONSTANTS)),), keywords))
    total = len(inputs) + len(ops)
    outputs = tuple(draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=3, unique=True)))
    return Description(
        inputs,
        tuple(ops),
        outputs,
        opaque=draw(st.sampled_from([None, "layers.0"])),
        data=draw(st.sampled_from([None, 1])),
    )


def with_input(d: Description, at: int, **changes: Any) -> Description:
    return replace(d, inputs=(*d.inputs[:at], replace(d.inputs[at], **changes), *d.inputs[at + 1 :]))


def with_op(d: Description, at: int, op: Op) -> Description:
    return replace(d, ops=(*d.ops[:at], op, *d.ops[at + 1 :]))


def text_of(value: Any) -> str:
    return f"{type(value)} {value!r}"


RESPECTS = [
    "op", "constant", "constant type", "keyword", "dropped constant", "dtype", "shape", "symbol for number", "relation",
    "stride", "offset", "device", "grad", "range", "alias", "order", "wiring", "swapped", "output choice",
    "output order", "one more output", "one more input", "one more op", "extra", "extra order", "opaque", "data",
]  # fmt: skip


@st.composite
def mutations(draw: Any, d: Description) -> Description:
    """A description that differs from `d` in exactly one respect."""
    respect = draw(st.sampled_from(RESPECTS))
    i, n = draw(st.integers(0, len(d.inputs) - 1)), draw(st.integers(0, len(d.ops) - 1))
    one, op = d.inputs[i], d.ops[n]
    if respect == "op":
        same = [t for t in (UNARY if len(op.args) == 1 else [*BINARY, *MUTATING]) if t != op.target]
        return with_op(d, n, replace(op, target=draw(st.sampled_from(same))))
    if respect == "constant":
        other = [c for c in CONSTANTS if text_of(c) != text_of(op.constants[0])]
        return with_op(d, n, replace(op, constants=(draw(st.sampled_from(other)),)))
    if respect == "constant type":
        value = draw(st.sampled_from([0, 1]))
        kinds = draw(st.lists(st.sampled_from([int, float, bool, str, complex]), min_size=2, max_size=2, unique=True))
        made = [with_op(d, n, replace(op, constants=(kind(value),))) for kind in kinds]
        return made[0] if text_of(kinds[0](value)) != text_of(op.constants[0]) else made[1]
    if respect == "keyword":
        changed = {(): (("alpha", 3),), (("alpha", 2),): (("alpha", True),)}.get(op.keywords, (("beta", 2.0),))
        return with_op(d, n, replace(op, keywords=changed))
    if respect == "dropped constant":
        return with_op(d, n, replace(op, constants=()))
    if respect == "dtype":
        return with_input(d, i, dtype=draw(st.sampled_from([t for t in DTYPES if t != one.dtype])))
    if respect == "shape":
        return with_input(d, i, shape=(one.shape[0], one.shape[1] + 1))
    if respect == "symbol for number":
        assume(not isinstance(one.shape[0], str))
        return with_input(d, i, shape=("c", one.shape[1]))
    if respect == "relation":  # one of several uses of a symbol becomes a symbol of its own
        used = [s for x in d.inputs for s in (str(x.shape[0]).partition("*")[0],)]
        key = str(one.shape[0]).partition("*")[0]
        assume(isinstance(one.shape[0], str) and used.count(key) > 1)
        return with_input(d, i, shape=(one.shape[0].replace(key, "z"), one.shape[1]))
    if respect == "stride":
        return with_input(d, i, stride=(one.shape[1] * 2, 1))
    if respect == "offset":
        return with_input(d, i, stride=(one.shape[1], 1), offset=8)
    if respect == "device":
        return with_input(d, i, device="meta")
    if respect == "grad":
        return with_input(d, i, grad=True)
    if respect == "range":
        assume(any(str(x.shape[0]).startswith("a") for x in d.inputs))
        return replace(d, upper=4096)
    if respect == "alias":
        j = next((j for j in range(i) if d.inputs[j] == one), None)
        assume(j is not None)
        return with_input(d, i, base=j)
    if respect == "order":
        assume(n > 0 and d.ops[n - 1] != op and all(a < len(d.inputs) for a in (*op.args, *d.ops[n - 1].args)))
        swapped = (*d.ops[: n - 1], op, d.ops[n - 1], *d.ops[n + 1 :])
        assume(d.data is None and d.opaque is None)
        return replace(d, ops=swapped)
    if respect == "wiring":
        return with_op(d, n, replace(op, args=((op.args[0] + 1) % (len(d.inputs) + n), *op.args[1:])))
    if respect == "swapped":
        assume(len(op.args) == 2 and op.args[0] != op.args[1])
        return with_op(d, n, replace(op, args=op.args[::-1]))
    total = len(d.inputs) + len(d.ops)
    free = [o for o in range(total) if o not in d.outputs]
    if respect == "output choice":
        return replace(d, outputs=(*d.outputs[:-1], draw(st.sampled_from(free))))
    if respect == "output order":
        assume(len(d.outputs) > 1)
        return replace(d, outputs=d.outputs[::-1])
    if respect == "one more output":
        return replace(d, outputs=(*d.outputs, draw(st.sampled_from(free))))
    if respect == "one more input":
        inputs = (*d.inputs, d.inputs[i])
        shift = [replace(o, args=tuple(a + (a >= len(d.inputs)) for a in o.args)) for o in d.ops]
        return replace(d, inputs=inputs, ops=tuple(shift), outputs=tuple(o + (o >= len(d.inputs)) for o in d.outputs))
    if respect == "one more op":
        assume(d.data is None)
        return replace(d, ops=(*d.ops, Op(torch.relu, (0,))))
    if respect == "extra":
        return replace(d, extra=("range 1 512",))
    if respect == "extra order":
        return replace(d, extra=("a\nextra 'b'",))
    if respect == "opaque":
        return replace(d, opaque="layers.0" if d.opaque is None else None)
    return replace(d, data=2 if d.data is None else d.data + 1)


@SETTINGS
@given(st.data())
def test_one_difference_never_collides(data: Any) -> None:
    one = data.draw(descriptions())
    other = data.draw(mutations(one))
    assume(one != other or text_of(one) != text_of(other))
    assert one.digest() != other.digest()


@SETTINGS
@given(
    descriptions(),
    st.sampled_from(["s", "t", "very_long"]),
    st.sampled_from(["x", "arg", "l_self_layers_7_weight"]),
    st.sampled_from(["", "renamed_", "z"]),
    st.sampled_from(["layers.3", "model.layers.79.attn"]),
)
def test_renamings_collide(d: Description, world: str, name: str, prefix: str, layer: str) -> None:
    renamed = replace(d, opaque=None if d.opaque is None else layer)
    assert d.digest() == renamed.digest(world, name, prefix)
    switch = {"a": "q", "b": "a", "a*2": "q*2"}
    inputs = tuple(replace(i, shape=(switch.get(i.shape[0], i.shape[0]), i.shape[1])) for i in d.inputs)
    assert d.digest() == replace(d, inputs=inputs).digest()


def test_types_of_constants_are_told_apart() -> None:
    w = World()
    x = w.tensor(("a", 8))
    texts = [digest([x], lambda g, p, c=c: [g.call_function(torch.add, (p[0], c))]) for c in CONSTANTS]
    assert len(set(texts)) == len(CONSTANTS)


def test_assumptions_about_symbols_are_told_apart() -> None:
    def of(assume_it: bool) -> str:
        w = World()
        x = w.tensor(("a", 8))
        if assume_it:
            assert x.shape[0] % 2 == 1
        return digest([x], lambda g, p: [g.call_function(torch.relu, (p[0],))])

    assert of(True) != of(False)


def test_which_inputs_overlap_is_told_apart() -> None:
    def of(which: tuple[int, int, int]) -> str:
        w = World()
        own = [w.tensor(("a", 8)) for _ in range(3)]
        with w.mode:
            values = [own[i].view_as(own[i]) for i in which]
        return digest(values, lambda g, p: [g.call_method("add_", (p[0], p[1])), g.call_method("add", (p[1], p[2]))])

    kinds = [(0, 1, 2), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 0)]
    assert len({of(k) for k in kinds}) == len(kinds)
    assert of((0, 1, 2)) == of((2, 0, 1))


def test_order_of_mutations_is_told_apart() -> None:
    def of(*names: str) -> str:
        w = World()
        values = [w.tensor(("a", 8)), w.tensor(("a", 8))]
        return digest(values, lambda g, p: [g.call_method(n, (p[0], p[1])) for n in names] and p[:1])

    assert of("add_", "mul_") != of("mul_", "add_")


def test_closures_and_wrapper_tensors_are_refused() -> None:
    w = World()
    x = w.tensor(("a", 8))
    with pytest.raises(Unfingerprintable, match="function"):
        digest([x], lambda g, p: [g.call_function(lambda t: t, (p[0],))])
    with pytest.raises(Unfingerprintable, match="constant"):
        digest([x], lambda g, p: [g.call_function(torch.add, (p[0], torch.ones(1)))])
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(Unfingerprintable, match="TwoTensor"):
        digest([TwoTensor(torch.ones(2), torch.ones(2))], lambda g, p: [g.call_function(torch.relu, (p[0],))])


def test_subgraphs_of_higher_order_ops_count() -> None:
    def of(op: Any, name: str) -> str:
        inner = fx.Graph()
        inner.output((inner.call_function(op, (inner.placeholder(f"{name}_in"),)),))
        owner = nn.Module()
        owner.register_module(name, fx.GraphModule(nn.Module(), inner))
        w = World()

        def build(g: fx.Graph, p: list[fx.Node]) -> list[fx.Node]:
            return [g.call_function(torch.ops.higher_order.cond, (True, g.get_attr(name), g.get_attr(name), (p[0],)))]

        made = piece([w.tensor(("a", 8))], build)
        return fingerprint(made, owner)

    assert of(torch.relu, "body_0") == of(torch.relu, "body_1") != of(torch.tanh, "body_0")


def test_layers_of_a_stack_have_one_fingerprint() -> None:
    s = stitched(named(), (torch.randn(5, 8),))
    decompose_sizes(s.graph)
    pieces = [
        p for p in split(s.graph, lambda n: "t::attn" in str(n.target) or "t.attn" in str(n.target)) if not p.splitting
    ]
    digests = [fingerprint(p, s.module) for p in pieces]
    assert len(digests) == 6
    assert len(set(digests)) == 1
    assert fingerprint(copy.copy(pieces[0]), s.module, ["other lowering"]) not in digests
