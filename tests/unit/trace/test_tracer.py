"""Adversarial models: the stitched graph is the full trace, node for node, and gives what the model gives."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.trace.capture import against_full_trace, backend_input, run, stitched
from tests.unit.trace.models import Layer, Name, each, stack
from vllm_compile_ext.trace import tracer as tracers
from vllm_compile_ext.trace import watch
from vllm_compile_ext.trace.bodies import NotOnce, region
from vllm_compile_ext.trace.stitch import stitch
from vllm_compile_ext.trace.tracer import Tracer

attn, attn_str = torch.ops.t.attn, torch.ops.t.attn_str
GLOBAL = torch.ones(8)
COUNTER = 0


def bump(model: Any, layer: Any, x: Any) -> Any:
    global COUNTER
    COUNTER = COUNTER + 1
    return layer(x)


def set_flag(model: Any, layer: Any, x: Any) -> Any:
    model.flag = layer.idx
    return layer(x)


def append(model: Any, layer: Any, x: Any) -> Any:
    x = layer(x)
    model.log.append(layer.idx)
    return x


def by_index(model: Any, layer: Any, x: Any) -> Any:
    return layer(x) if layer.idx % 2 else layer(x) + 1


def holder(model: Any) -> None:
    model.flag = 0
    for layer in model.layers:
        layer.holder = [model]


def scaled(w: Any) -> Callable[[Any], Any]:
    return lambda x: x * w


def matmul(w: Any) -> Callable[[Any], Any]:
    return lambda x: x @ w


class Same(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def mode(model: Any, layer: Any, x: Any) -> Any:
    if layer.idx % 2:
        with Same():
            return layer(x)
    return layer(x)


def autocast(model: Any, layer: Any, x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16, enabled=layer.idx >= 3):
        return layer(x.float())


def residual(model: Any, layer: Any, x: Any) -> Any:
    y, model_residual = layer(x, None) if layer.idx == 0 else layer(*x)
    return (y, model_residual) if layer.idx < 5 else y + model_residual


def double_weight(model: Any) -> None:
    for layer in model.layers:
        layer.lin2 = nn.Linear(8, 8)


def two(self: Any, x: Any) -> Any:
    return self.lin(x) + self.lin2(x)


def tie(*which: int) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        double_weight(model)
        for i in which:
            model.layers[i].lin2.weight = model.layers[i].lin.weight

    return prepare


class Other(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


def other_class(model: Any) -> None:
    model.layers[3].lin.__class__ = Other


def patched(layer: Any, k: int) -> Callable[[Any], Any]:
    return lambda x: nn.functional.linear(x, layer.weight) * k


def monkeypatch_forward(model: Any) -> None:
    model.layers[3].forward = patched(model.layers[3].lin, 5)


def patch_inner(model: Any) -> None:
    model.layers[3].lin.forward = patched(model.layers[3].lin, 5)


def patch_all(model: Any) -> None:
    for i, layer in enumerate(model.layers):
        layer.forward = patched(layer.lin, i)


def puts_back(self: Any, x: Any) -> Any:
    self.slot = self.idx
    self.slots[0] = 1
    x = self.lin(x)
    self.slot = None
    self.slots[0] = None
    return x


def grad_mode(model: Any, layer: Any, x: Any) -> Any:
    with torch.set_grad_enabled(layer.idx == 3):
        return layer(x)


def special(model: Any) -> None:
    for layer in model.layers:
        layer.special = {model.layers[1], model.layers[4]}
        layer.root_holder = model.log
    model.log.append(model.layers[4])


@torch._dynamo.assume_constant_result
def odd(layer: Any) -> int:
    return 2 if layer.idx % 2 else 1


@torch._dynamo.assume_constant_result
def name_of(name: Any) -> str:
    return getattr(name, "real_obj", name).value


BY_NAME: dict[str, Any] = {}


def only_looks_up(self: Any, x: Any) -> Any:
    return BY_NAME[name_of(Name(self.name))].lin(x)


def by_name(swap: bool) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        BY_NAME.clear()
        BY_NAME.update((layer.name, layer) for layer in model.layers)
        if swap:
            BY_NAME["layers.3"], BY_NAME["layers.4"] = BY_NAME["layers.4"], BY_NAME["layers.3"]

    return prepare


def looks_up(self: Any, x: Any) -> Any:
    return attn(BY_NAME[name_of(Name(self.name))].lin(x), Name(self.name))


@dataclasses.dataclass(frozen=True)
class Frozen:
    by: Any


class ByIdentity:
    by = 2.0


class Config:
    def __init__(self, **kw: Any) -> None:
        self.__dict__.update(kw)


ONES = [ByIdentity(), ByIdentity()]


CASES: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "plain": (lambda: stack(), 5),
    "index unread": (lambda: stack(lambda s, x: s.lin(x)), 5),
    "index read": (lambda: stack(lambda s, x: s.lin(x) * 2 if s.idx % 2 else s.lin(x)), 0),
    "index read outside": (lambda: stack(outer=by_index), 0),
    "scalar per layer": (lambda: stack(lambda s, x: s.lin(x) * s.scale, scale=float), 0),
    "scalar alternating": (lambda: stack(lambda s, x: s.lin(x) * s.scale, scale=lambda i: float(i % 2)), 4),
    "flag": (lambda: stack(lambda s, x: s.lin(x).relu() if s.on else s.lin(x), on=lambda i: i % 3 == 0), 4),
    "name": (lambda: stack(lambda s, x: attn(s.lin(x), Name(s.name))), 5),
    "name, then inspected": (
        lambda: stack(lambda s, x: attn(s.lin(x), Name(s.name)) * (2 if s.name.endswith("3") else 1)),
        0,
    ),
    "inspected, then a name": (
        lambda: stack(lambda s, x: attn(s.lin(x) * (2 if "3" in s.name else 1), Name(s.name))),
        0,
    ),
    "name inspected outside": (
        lambda: stack(
            lambda s, x: attn(s.lin(x), Name(s.name)), outer=lambda m, s, x: s(x) if s.name.endswith("1") else s(x) + 1
        ),
        None,
    ),
    "in a set, by what it holds": (
        lambda: stack(lambda s, x: s.lin(x) * (2 if Frozen(1.0) in s.some else 3), some=lambda i: {Frozen(1.0)}),
        5,
    ),
    "in a set, by its identity": (
        lambda: stack(
            lambda s, x: s.lin(x) * (2 if Frozen(s.one) in s.some else 3),
            some=lambda i: {Frozen(ONES[0])},
            one=lambda i: ONES[i % 2],
        ),
        4,
    ),
    "name made of a name": (lambda: stack(lambda s, x: attn(s.lin(x), Name(s.name + ".attn"))), 0),
    "string to an op": (lambda: stack(lambda s, x: attn_str(s.lin(x), s.name)), 0),
    "name object": (lambda: stack(lambda s, x: attn(s.lin(x), s.obj), obj=lambda i: Name(f"n{i}")), None),
    "hasattr": (
        lambda: stack(
            lambda s, x: s.lin(x) * 2 if hasattr(s, "odd") else s.lin(x),
            prepare=lambda m: [setattr(layer, "odd", 1) for layer in list(m.layers)[1::2]],
        ),
        4,
    ),
    "all weights tied": (
        lambda: stack(prepare=lambda m: [setattr(x.lin, "weight", m.layers[0].lin.weight) for x in m.layers]),
        5,
    ),
    "weights of two layers tied": (
        lambda: stack(prepare=lambda m: setattr(m.layers[4].lin, "weight", m.layers[2].lin.weight)),
        5,
    ),
    "weight of first tied to third": (
        lambda: stack(prepare=lambda m: setattr(m.layers[2].lin, "weight", m.layers[0].lin.weight)),
        5,
    ),
    "weights tied in a later layer": (lambda: stack(two, prepare=tie(3)), None),
    "weights tied in the traced layer": (lambda: stack(two, prepare=tie(0)), None),
    "weights tied in each layer": (lambda: stack(two, prepare=tie(*range(6))), 5),
    "module tied in one layer": (
        lambda: stack(two, prepare=lambda m: (double_weight(m), setattr(m.layers[3], "lin2", m.layers[3].lin))),
        None,
    ),
    "no bias in one": (lambda: stack(prepare=lambda m: setattr(m.layers[3], "lin", nn.Linear(8, 8, bias=False))), 4),
    "None buffer in one": (
        lambda: stack(
            lambda s, x: s.lin(x) if s.buf is None else s.lin(x) + s.buf,
            prepare=lambda m: [x.register_buffer("buf", None if x.idx == 3 else torch.ones(8)) for x in m.layers],
        ),
        4,
    ),
    "same object twice": (lambda: stack(prepare=lambda m: m.layers.__setitem__(3, m.layers[1])), 5),
    "same object in each place": (
        lambda: stack(prepare=lambda m: [m.layers.__setitem__(i, m.layers[0]) for i in range(6)]),
        5,
    ),
    "layer counts its calls": (
        lambda: stack(lambda s, x: (setattr(s, "calls", s.calls + 1), s.lin(x))[1], calls=lambda i: 0),
        0,
    ),
    "outer appends": (lambda: stack(outer=append), None),
    "outer sets a flag": (lambda: stack(outer=set_flag), None),
    "outer sets a flag that layers read": (
        lambda: stack(lambda s, x: s.lin(x) * (2 if s.holder[0].flag % 2 else 1), outer=set_flag, prepare=holder),
        0,
    ),
    "global counter": (lambda: stack(lambda s, x: s.lin(x) * COUNTER, outer=bump), 0),
    "log read": (
        lambda: stack(lambda s, x: s.lin(x) * len(s.holder[0].log), outer=append, prepare=holder),
        0,
    ),
    "closure with a weight": (
        lambda: stack(lambda s, x: s.f(x), prepare=each(lambda x: setattr(x, "f", matmul(torch.randn(8, 8))))),
        5,
    ),
    "closure with a scalar": (
        lambda: stack(lambda s, x: s.f(x), prepare=each(lambda x: setattr(x, "f", scaled(float(x.idx))))),
        0,
    ),
    "different functions": (
        lambda: stack(
            lambda s, x: s.f(s.lin(x)), prepare=each(lambda x: setattr(x, "f", torch.relu if x.idx % 2 else torch.tanh))
        ),
        4,
    ),
    "dict, one key read": (lambda: stack(lambda s, x: s.lin(x) * s.cfg["k"], cfg=lambda i: {"k": i // 3, "u": i}), 0),
    "dict iterated": (
        lambda: stack(lambda s, x: s.lin(x) * sum(s.cfg.values()), cfg=lambda i: {"k": i // 3, "u": 1}),
        4,
    ),
    "dict, another order": (
        lambda: stack(
            lambda s, x: s.lin(x) * next(iter(s.cfg.values())),
            cfg=lambda i: {"a": 2, "b": 3} if i % 2 else {"b": 3, "a": 2},
        ),
        4,
    ),
    "read by __dict__": (lambda: stack(lambda s, x: s.lin(x) * s.__dict__["idx"]), 0),
    "read by vars": (lambda: stack(lambda s, x: s.lin(x) * vars(s)["idx"]), 0),
    "config object by vars": (lambda: stack(lambda s, x: s.lin(x) * vars(s.cfg)["k"], cfg=lambda i: Config(k=i)), 0),
    "config object": (lambda: stack(lambda s, x: s.lin(x) * s.cfg.k, cfg=lambda i: Config(k=i // 3, u=i)), 4),
    "list of another length": (lambda: stack(lambda s, x: s.lin(x) * len(s.ls), ls=lambda i: [1] * (i // 3 + 1)), 4),
    "table by index": (lambda: stack(lambda s, x: s.lin(x) * s.tab[s.idx], tab=lambda i: [1, 2, 3, 4, 5, 6]), 0),
    "global tensor": (lambda: stack(lambda s, x: s.lin(x) + GLOBAL), 5),
    "hook on one": (lambda: stack(prepare=lambda m: m.layers[3].register_forward_hook(lambda s, a, o: o * 2)), 4),
    "hook on the traced one": (
        lambda: stack(prepare=lambda m: m.layers[0].register_forward_hook(lambda s, a, o: o * 2)),
        4,
    ),
    "pre-hook inside one": (
        lambda: stack(prepare=lambda m: m.layers[3].lin.register_forward_pre_hook(lambda s, a: (a[0] * 2,))),
        4,
    ),
    "hooks on all": (
        lambda: stack(prepare=each(lambda s: s.register_forward_hook((lambda k: lambda m, a, o: o * k)(s.idx)))),
        0,
    ),
    "another __class__ inside": (lambda: stack(prepare=other_class), 4),
    "forward patched on one": (lambda: stack(prepare=monkeypatch_forward), 4),
    "forward patched inside one": (lambda: stack(prepare=patch_inner), 4),
    "forward patched on all": (lambda: stack(prepare=patch_all), 0),
    "training flag": (
        lambda: stack(
            lambda s, x: nn.functional.dropout(s.lin(x), 0.5, s.training), prepare=lambda m: m.eval().layers[3].train()
        ),
        4,
    ),
    "passes its argument": (lambda: stack(lambda s, x: x), None),
    "returns a list": (lambda: stack(lambda s, x: [s.lin(x)], outer=lambda m, s, x: s(x)[0]), 5),
    "returns a dict": (lambda: stack(lambda s, x: {"a": s.lin(x)}, outer=lambda m, s, x: s(x)["a"]), 0),
    "returns a view": (lambda: stack(lambda s, x: s.lin(x).chunk(2, -1), outer=lambda m, s, x: torch.cat(s(x), -1)), 0),
    "returns a view of its argument": (lambda: stack(lambda s, x: x.view(-1, 8)), 0),
    "view mutated outside": (
        lambda: stack(
            lambda s, x: (s.lin(x), x.view(-1)), outer=lambda m, s, x: (lambda y, v: (v.add_(1), y + x)[1])(*s(x * 1))
        ),
        0,
    ),
    "residual": (
        lambda: stack(lambda s, x, r=None: (s.lin(x), x if r is None else x + r), outer=residual),
        0,  # the model reads the index
    ),
    "in place": (lambda: stack(lambda s, x: s.lin(x).add_(1)), 5),
    "mutates a buffer": (
        lambda: stack(
            lambda s, x: s.lin(x) + s.buf.add_(1), prepare=each(lambda x: x.register_buffer("buf", torch.zeros(8)))
        ),
        5,
    ),
    "mutates its argument": (lambda: stack(lambda s, x: (x.add_(1), s.lin(x))[1], outer=lambda m, s, x: s(x * 1)), 5),
    "type of an attribute": (
        lambda: stack(lambda s, x: s.lin(x) * (2 if type(s.q) is int else 1), q=lambda i: 1 if i % 2 else 1.0),
        4,
    ),
    "isinstance": (
        lambda: stack(lambda s, x: s.lin(x) * (2 if isinstance(s.q, list) else 1), q=lambda i: [] if i % 2 else ()),
        4,
    ),
    "set of numbers": (lambda: stack(lambda s, x: s.lin(x) * (2 if s.idx in s.some else 1), some=lambda i: {1, 4}), 0),
    "getattr by name": (
        lambda: stack(
            lambda s, x: s.lin(x) * getattr(s, s.name.replace(".", "_"), 1),
            prepare=lambda m: setattr(m.layers[3], "layers_3", 5),
        ),
        None,
    ),
    "is the first layer": (
        lambda: stack(
            lambda s, x: s.lin(x) * (2 if s.holder[0].layers[0] is s else 1),
            prepare=holder,
        ),
        None,
    ),
    "is a listed layer": (
        lambda: stack(lambda s, x: s.lin(x) * (2 if s.root_holder[0] is s else 1), prepare=special),
        None,
    ),
    "in a set of layers": (lambda: stack(lambda s, x: s.lin(x) * (2 if s in s.special else 1), prepare=special), None),
    "reads its own identity": (
        lambda: stack(
            lambda s, x: s.lin(x) * (2 if id(s) in s.ids else 1),
            prepare=lambda m: [setattr(x, "ids", {id(m.layers[2])}) for x in m.layers],
        ),
        None,
    ),
    "looks itself up by name": (lambda: stack(looks_up, prepare=by_name(False)), 0),
    "looks up others by name": (lambda: stack(looks_up, prepare=by_name(True)), 0),
    "only looks itself up": (lambda: stack(only_looks_up, prepare=by_name(False)), 0),
    "name inspected by a function": (
        lambda: stack(lambda s, x: attn(s.lin(x), Name(s.name)) * (2 if name_of(Name(s.name)) == "layers.3" else 1)),
        0,
    ),
    "constant result": (lambda: stack(lambda s, x: s.lin(x) * odd(s)), 0),
    "function mode around some": (lambda: stack(outer=mode), None),
    "autocast around some": (lambda: stack(outer=autocast), None),
    "grad mode around some": (
        lambda: stack(lambda s, x: s.lin(x) * (2 if torch.is_grad_enabled() else 1), outer=grad_mode),
        0,  # the model reads the index
    ),
    "puts back what it changes": (
        lambda: stack(puts_back, prepare=each(lambda s: (setattr(s, "slot", None), setattr(s, "slots", [None])))),
        0,  # it reads the index
    ),
    "puts back what it changes, reading nothing": (
        lambda: stack(lambda s, x: (setattr(s, "slot", 1), s.lin(x), setattr(s, "slot", None))[1], slot=lambda i: None),
        5,
    ),
    "views across pieces": (
        lambda: stack(lambda s, x: (lambda y: y + torch.sigmoid(y.view(-1)).view(-1, 8))(s.lin(x))),
        5,
    ),
    "buffer written across pieces": (
        lambda: stack(
            lambda s, x: (lambda y, o: (torch.ops.t.attn_out(y, o), o + y)[1])(s.lin(x), torch.empty_like(x))
        ),
        5,
    ),
    "two lists": (
        lambda: stack(prepare=lambda m: m.register_module("more", nn.ModuleList(list(m.layers)[:3]))),
        4,
    ),
    "size passed on": (lambda: stack(lambda s, x: s.lin(x).view(x.size(0), -1) + x.shape[0]), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_stitched_is_full_trace(name: str) -> None:
    global COUNTER
    COUNTER = 0
    make, stamped = CASES[name]
    model, x = make(), torch.randn(5, 8)
    s = stitched(model, (x,))
    assert against_full_trace(s, model, (x,)) is None, s.tracer.reasons
    if stamped is not None:
        assert s.tracer.stamped == stamped, s.tracer.reasons
    assert s.tracer.traced + s.tracer.stamped <= 6 or s.tracer.reasons
    if name in UNSTABLE:
        return
    # One row more than while it was traced; what layers change in place starts from the same values.
    args = (torch.randn(7, 8),)
    s.inputs = [args[0] if value is x else value for value in s.inputs]
    before = copy.deepcopy(model.state_dict())
    got, _ = run(s, model, (args[0].clone(),))
    model.load_state_dict(before)
    COUNTER = 0
    with torch.no_grad():
        expected = model(args[0])
    torch.testing.assert_close(got[0], expected, rtol=0, atol=0)


# Dropout gives another result each time.
UNSTABLE = {"training flag"}


def test_the_first_call_traces_and_counts() -> None:
    model = stack()
    s = stitched(model, (torch.randn(5, 8),))
    assert (s.tracer.traced, s.tracer.stamped, s.tracer.reasons) == (1, 5, [])
    assert isinstance(model.layers[0], Layer)


@pytest.mark.parametrize("forward", [looks_up, only_looks_up])
@pytest.mark.parametrize(("swap", "stamped"), [(False, 5), (True, 3)])
def test_known_lookups_are_followed(forward: Callable[..., Any], swap: bool, stamped: int) -> None:
    model, x = stack(forward, prepare=by_name(swap)), torch.randn(5, 8)
    s = stitched(model, (x,), lookups=[name_of], tables=[BY_NAME])
    assert against_full_trace(s, model, (x,)) is None
    assert s.tracer.stamped == stamped, s.tracer.reasons


def test_reasons_are_readable() -> None:
    s = stitched(CASES["scalar per layer"][0](), (torch.randn(5, 8),))
    assert "L['self']._modules['layers']._modules['1']: .scale: 0.0 / 1.0" in s.tracer.reasons


def test_fewer_than_least_are_left_alone() -> None:
    s = stitched(stack(n=2), (torch.randn(5, 8),))
    assert (s.tracer.traced, s.tracer.stamped) == (0, 0)


def dynamo() -> list[Any]:
    from torch._dynamo.variables import functions, nn_module
    from torch._dynamo.variables.script_object import OpaqueObjectClassVariable

    return [
        nn_module.UnspecializedNNModuleVariable.call_function,
        OpaqueObjectClassVariable.call_function,
        functions.invoke_and_store_as_constant,
        nn_module.invoke_and_store_as_constant,
        set(torch.fx.node._side_effectful_functions),
    ]


def test_hooks_leave_with_the_last_tracer() -> None:
    before = dynamo()
    one, two = Tracer(stack()), Tracer(stack())
    first, second = one.install(), two.install()
    first.__enter__()
    second.__enter__()
    with one.install(), one.install():
        assert watch.installed()
    first.__exit__(None, None, None)  # not in the order they came
    assert watch.installed()
    second.__exit__(None, None, None)
    assert not watch.installed()
    assert dynamo() == before


def fails(self: Any, x: Any) -> Any:
    if self.idx == 2:
        raise ValueError("a layer's own error")
    return self.lin(x)


def test_a_failing_trace_leaves_nothing_behind() -> None:
    before = dynamo()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        stitched(stack(fails), (torch.randn(5, 8),))
    assert dynamo() == before
    model, x = stack(), torch.randn(5, 8)
    assert against_full_trace(stitched(model, (x,)), model, (x,)) is None


def test_a_failing_tracer_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dynamo()
    monkeypatch.setattr(tracers, "_stamp", lambda *a: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        stitched(stack(), (torch.randn(5, 8),))
    assert dynamo() == before


def test_data_dependent_control_flow_is_dynamos_error() -> None:
    model = stack(lambda s, x: s.lin(x) if x.sum() > 0 else x)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as ours:
        stitched(model, (torch.randn(5, 8),))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as theirs:
        backend_input(model, (torch.randn(5, 8),))
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_a_body_that_lost_a_node_is_refused() -> None:
    model, x = stack(), torch.randn(5, 8)
    tracer = Tracer(model)
    got = backend_input(model, (x,), tracer)
    graph = got.graph_module.graph
    body = next(n for n in graph.nodes if n.target is region).meta["vllm_compile_ext.call"].body
    body.outputs[1].replace_all_uses_with(next(iter(graph.nodes)))
    graph.erase_node(body.outputs[1])
    with pytest.raises(NotOnce, match="erased"):
        stitch(graph, list(got.example_inputs))
