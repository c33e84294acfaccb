"""Plans: plain data, one callable a call site, extras read anew at each call."""

from __future__ import annotations

import math
import operator
import os
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
import torch.fx as fx
from torch import nn

from tests.unit.trace.capture import run, splits, stitched
from tests.unit.trace.models import Name, named, stack, views, written
from vllm_compile_ext.trace import names
from vllm_compile_ext.trace.call import NotOnce
from vllm_compile_ext.trace.plan import Made, Plan, dumps, loads, reader_of, steps, write
from vllm_compile_ext.trace.split import decompose_sizes, split


def planned(model: nn.Module) -> tuple[Any, Plan]:
    s = stitched(model, (torch.randn(5, 8),))
    decompose_sizes(s.graph)
    pieces = split(s.graph, splits)
    return s, write(s.graph, pieces, [None if p.splitting else 0 for p in pieces], s.extras)


def test_every_call_site_has_its_own_callable() -> None:
    _, plan = planned(named())
    assert len(plan.calls) == 6
    order: list[int] = []

    def site(number: int) -> Any:
        def call(*args: Any) -> list[Any]:
            order.append(number)
            return [next(a for a in args if isinstance(a, torch.Tensor))]

        return call

    call = plan.load([site(i) for i in range(6)])
    model = named()
    inputs = call.__code__.co_argcount - 1
    call(plan.gatherer(model)(), *[torch.ones(2, 8)] * (inputs - 1), Name("layers.0"))
    assert order == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="2 callables for 6 call sites"):
        plan.load([site(0), site(1)])


# Ways to give a model other weights; `parameter` makes one of `new`.
REPLACEMENTS = {
    "in place": "model.layers[2].lin.weight.data.copy_(new)",
    "data": "model.layers[2].lin.weight.data = new",
    "attribute": "model.layers[2].lin.weight = parameter",
    "registered": "del model.layers[2].lin.weight; model.layers[2].lin.register_parameter('weight', parameter)",
    # What vLLM 0.32's weight_cache/ipc_loader.py does.
    "table": "model.layers[2].lin._parameters['weight'] = parameter",
    "module": "model.layers[2].lin = nn.Linear(8, 8); model.layers[2].lin.weight = parameter",
    "layer": "model.layers[2] = new_layer; model.layers[2].lin.weight = parameter",
    "table of modules": "model.layers._modules['2'] = new_layer; model.layers[2].lin.weight = parameter",
    # Torch's containers tell nobody of this.
    "inserted": "model.layers.insert(2, new_layer); model.layers[2].lin.weight = parameter",
    "all parameters": "lin = model.layers[2].lin\n"
    "lin.__dict__['_parameters'] = dict(lin._parameters, weight=parameter)",
}


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_a_replaced_parameter_is_seen(how: str) -> None:
    model = stack()
    s, plan = planned(model)
    gather = plan.gatherer(model)
    assert all(a is b.value for a, b in zip(gather(), s.extras, strict=True))
    new = torch.full((8, 8), 3.0)
    parameter, new_layer = nn.Parameter(new, requires_grad=False), type(model.layers[2])(2)
    exec(REPLACEMENTS[how], {"model": model, "new": new, "parameter": parameter, "new_layer": new_layer, "nn": nn})
    assert [v for v in gather() if v.shape == new.shape and bool((v == new).all())]
    assert any(v is model.layers[2].lin.weight for v in gather())


def test_names_are_made_once() -> None:
    model = named()
    _, plan = planned(model)
    gather = plan.gatherer(model)
    one, two = ([v for v in gather() if isinstance(v, Name)] for _ in range(2))
    assert [n.value for n in one] == [f"layers.{i}" for i in range(1, 6)]
    assert all(a is b for a, b in zip(one, two, strict=True))


def test_memory_is_let_go() -> None:
    _, plan = planned(views())
    made = [line.split(" = ")[0] for line in plan.source.splitlines() if " = " in line]
    assert len(made) > 6
    assert sum(line.strip().startswith("del ") for line in plan.source.splitlines()) >= 6


def test_a_plan_survives_its_bytes() -> None:
    for make in (named, views, written):
        _, plan = planned(make())
        assert loads(dumps(plan)) == plan


def test_what_a_plan_cannot_hold_is_refused() -> None:
    for constant in (lambda: 0, os.system, Plan, torch.ones(1), torch.load, eval):
        graph = fx.Graph()
        graph.output((graph.call_function(torch.relu, (graph.placeholder("x"), constant)),))
        with pytest.raises(NotOnce, match="cannot hold"):
            write(graph, split(graph, lambda n: False), [None], [])


@pytest.mark.parametrize(
    "name",
    [
        "fn:os.system", "fn:builtins.eval", "fn:torch.load", "fn:torch.hub.load", "fn:torch.os.system", "op:x", "",
        "dtype:load", "format:float32", "higher:cond",
    ],
)  # fmt: skip
def test_foreign_names_are_refused(name: str) -> None:
    with pytest.raises(names.Unnameable):
        loads(dumps(Plan("", [name], [])))


@pytest.mark.parametrize("data", [b"", b"nonsense", pickle.dumps(1), msgspec.msgpack.encode(Made(("os", "system")))])
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        loads(data)


def test_only_opaque_types_are_made() -> None:
    plan = Plan("", [], [], fixed=[Made(("os", "system"), ("echo never",))])
    with pytest.raises(NotOnce, match=r"os\.system is no opaque type"):
        plan.gatherer(nn.Module())


@pytest.mark.parametrize(
    "value",
    [
        torch.add, torch.nn.functional.linear, torch.functional.split, torch.ops.aten.add, torch.ops.aten.add.Tensor,
        torch.ops.aten.relu.default, torch.ops.t.attn, torch.float32, torch.device("cpu"), torch.device("cuda", 1),
        torch.strided, torch.channels_last, operator.getitem, math.floor, len,
    ],
)  # fmt: skip
def test_names_lead_back(value: Any) -> None:
    assert names.find(names.name(value)) == value


def bound(expressions: Any, root: nn.Module, fixed: list[Any]) -> Any:
    space: dict[str, Any] = {}
    exec(reader_of(expressions), space)
    return lambda: space["read"](root, fixed)


def test_the_reader() -> None:
    model = stack()
    expressions = [
        f"L['self']._modules['layers']._modules['{i}']._modules['lin']._parameters['{p}']"
        for i in range(6)
        for p in ("weight", "bias")
    ]
    read = bound([*expressions, "L['self'].layers", None, "L['self']"], model, ["made"])
    assert read()[3] is model.layers[1].lin.bias
    assert read()[-3:] == [model.layers, "made", model]
    assert bound([], model, [])() == []


def test_what_is_no_module_may_be_replaced_too() -> None:
    """vLLM 0.32's CPU layers: packed weights in the closure of a function, which loading weights again replaces."""
    model = stack()

    def pack(weight: torch.Tensor) -> Any:
        return lambda x: x @ weight

    lin = model.layers[1].lin
    lin.packed = pack(lin.weight)
    prefix = "L['self']._modules['layers']._modules['1']._modules['lin']"
    read = bound([f"{prefix}.packed.__closure__[0].cell_contents", f"{prefix}.packed"], model, [])
    assert read()[0] is lin.weight
    new = torch.zeros(8, 8)
    lin.packed = pack(new)
    assert read()[0] is new


@pytest.mark.parametrize("expression", ["G['x'].y", "L['a'].f()", "__import__('os')", "L", "L[x].y", "(", "L['a'] + 1"])
def test_other_expressions_are_refused(expression: str) -> None:
    with pytest.raises(NotOnce):
        steps(expression)


def test_extras_of_one_local_only() -> None:
    with pytest.raises(NotOnce, match="several"):
        reader_of(["L['a'].x", "L['b'].x"])


@pytest.mark.parametrize("make", [stack, named, views, written])
def test_run_is_what_the_model_gives(make: Callable[[], nn.Module]) -> None:
    """With more rows than while it was traced."""
    model, x, rows = make(), torch.randn(5, 8), torch.randn(7, 8)
    s = stitched(model, (x,))
    s.inputs = [rows if value is x else value for value in s.inputs]
    got, plan = run(s, model, (rows,))
    torch.testing.assert_close(got[0], model(rows), rtol=0, atol=0)
    assert len(set(plan.calls)) < 6


def test_a_plan_of_bytes_brings_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    _, plan = planned(model)
    same, other = loads(dumps(plan)), loads(dumps(plan))
    same.source = same.reader = "no Python"
    gathered = same.gatherer(model)()
    assert all(a is b for a, b in zip(gathered, plan.gatherer(model)(), strict=True))
    other.code = b"of another Python"
    monkeypatch.setattr("vllm_compile_ext.trace.plan.PYTHON", "another")
    assert all(a is b for a, b in zip(other.gatherer(model)(), gathered, strict=True))
