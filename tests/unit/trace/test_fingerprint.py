"""Pieces that differ in one respect never collide; pieces that differ in names always do."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
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
CONSTANTS += [(1.0,), ((1,),), slice(0, 1), slice(0, 1, 1), torch.float32, torch.int64, torch.device("cpu")]
CONSTANTS += [1j, b"1", ...]


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


def text_of(value: Any) -> str:
    return f"{type(value)} {value!r}"


@st.composite
def mutations(draw: Any, d: Description) -> Description:
    """A description that differs from `d` in exactly one respect."""
    i, n = draw(st.integers(0, len(d.inputs) - 1)), draw(st.integers(0, len(d.ops) - 1))
    one, op = d.inputs[i], d.ops[n]
    rows, columns = one.shape
    symbol = rows.partition("*")[0] if isinstance(rows, str) else None
    symbols = [str(other.shape[0]).partition("*")[0] for other in d.inputs]
    total = len(d.inputs) + len(d.ops)
    twin = next((j for j in range(i) if d.inputs[j] == one), None)
    before = d.ops[n - 1] if n else op
    of_inputs = all(a < len(d.inputs) for a in (*op.args, *before.args))
    keywords = {(): (("alpha", 3),), (("alpha", 2),): (("alpha", True),)}.get(op.keywords, (("beta", 2.0),))

    def other(values: Iterable[Any], than: Any) -> Any:
        return draw(st.sampled_from([v for v in values if text_of(v) != text_of(than)]))

    def with_input(**changes: Any) -> Description:
        return replace(d, inputs=(*d.inputs[:i], replace(one, **changes), *d.inputs[i + 1 :]))

    def with_op(**changes: Any) -> Description:
        return replace(d, ops=(*d.ops[:n], replace(op, **changes), *d.ops[n + 1 :]))

    def moved(numbers: Sequence[int]) -> tuple[int, ...]:  # past one more input
        return tuple(number + (number >= len(d.inputs)) for number in numbers)

    # Respect -> the description; None where `d` has no such thing.
    table: dict[str, Callable[[], Description | None]] = {
        "op": lambda: with_op(target=other(UNARY if len(op.args) == 1 else [*BINARY, *MUTATING], op.target)),
        "constant": lambda: with_op(constants=(other(CONSTANTS, op.constants[0]),)),
        "constant type": lambda: with_op(
            constants=(other((kind(draw(bits)) for kind in (int, float, bool, str, complex)), op.constants[0]),)
        ),
        "keyword": lambda: with_op(keywords=keywords),
        "dropped constant": lambda: with_op(constants=()),
        "dtype": lambda: with_input(dtype=other(DTYPES, one.dtype)),
        "shape": lambda: with_input(shape=(rows, columns + 1)),
        "symbol for number": lambda: None if symbol else with_input(shape=("c", columns)),
        # One of several uses of a symbol becomes a symbol of its own.
        "relation": lambda: (
            with_input(shape=(rows.replace(symbol, "z"), columns)) if symbol and symbols.count(symbol) > 1 else None
        ),
        "stride": lambda: with_input(stride=(columns * 2, 1)),
        "offset": lambda: with_input(stride=(columns, 1), offset=8),
        "device": lambda: with_input(device="meta"),
        "grad": lambda: with_input(grad=True),
        "range": lambda: replace(d, upper=4096) if "a" in symbols else None,
        "alias": lambda: None if twin is None else with_input(base=twin),
        "order": lambda: (
            replace(d, ops=(*d.ops[: n - 1], op, before, *d.ops[n + 1 :]))
            if before != op and of_inputs and d.data is d.opaque is None
            else None
        ),
        "wiring": lambda: with_op(args=((op.args[0] + 1) % (len(d.inputs) + n), *op.args[1:])),
        "swapped": lambda: None if len(set(op.args)) == 1 else with_op(args=op.args[::-1]),
        "output choice": lambda: replace(d, outputs=(*d.outputs[:-1], draw(unused))),
        "output order": lambda: replace(d, outputs=d.outputs[::-1]) if len(d.outputs) > 1 else None,
        "one more output": lambda: replace(d, outputs=(*d.outputs, draw(unused))),
        "one more input": lambda: replace(
            d,
            inputs=(*d.inputs, one),
            ops=tuple(replace(o, args=moved(o.args)) for o in d.ops),
            outputs=moved(d.outputs),
        ),
        "one more op": lambda: replace(d, ops=(*d.ops, Op(torch.relu, (0,)))) if d.data is None else None,
        "extra": lambda: replace(d, extra=("range 1 512",)),
        "extra order": lambda: replace(d, extra=("a\nextra 'b'",)),
        "opaque": lambda: replace(d, opaque="layers.0" if d.opaque is None else None),
        "data": lambda: replace(d, data=2 if d.data is None else d.data + 1),
    }
    unused = st.sampled_from([o for o in range(total) if o not in d.outputs])
    bits = st.sampled_from([0, 1])
    made = table[draw(st.sampled_from(list(table)))]()
    assume(made is not None)
    return made


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
    with pytest.raises(Unfingerprintable, match="holds a Tensor"):
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
