"""The Tracer by itself: what it counts and says, known lookups, its hooks.  Stacks that set traps are in tests/fuzz."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.fx as fx

from tests.unit.trace.capture import against_full_trace, backend_input, stitched
from tests.unit.trace.models import Layer, Name, stack
from vllm_compile_ext import versions
from vllm_compile_ext.trace import tracer as tracers
from vllm_compile_ext.trace import watch
from vllm_compile_ext.trace.call import NotOnce, keep_alive, region
from vllm_compile_ext.trace.stitch import difference, stitch
from vllm_compile_ext.trace.tracer import Tracer

attn = torch.ops.t.attn


@torch._dynamo.assume_constant_result
def odd(layer: Any) -> int:
    return 2 if layer.idx % 2 else 1


@torch._dynamo.assume_constant_result
def name_of(name: Any) -> str:
    return getattr(name, "real_obj", name).value


BY_NAME: dict[str, Any] = {}


def only_looks_up(self: Any, x: Any) -> Any:
    return BY_NAME[name_of(Name(self.name))].lin(x)


def looks_up(self: Any, x: Any) -> Any:
    return attn(BY_NAME[name_of(Name(self.name))].lin(x), Name(self.name))


def inspects(self: Any, x: Any) -> Any:
    return attn(self.lin(x), Name(self.name)) * (2 if name_of(Name(self.name)) == "layers.3" else 1)


def dynamo() -> list[Any]:
    """What is there in each place that is hooked."""
    found: list[Any] = [fx.node._side_effectful_functions & {keep_alive, region}]
    for owner, names, _ in watch.PLACES:
        at = watch.find_owner(owner)
        for name in filter(None, map(versions.dynamo, names)):
            found.append(at[name] if isinstance(at, dict) else getattr(at, name))
    return found


@pytest.fixture(autouse=True)
def unhooked() -> Iterator[None]:
    """Dynamo is as it was after each test."""
    before = dynamo()
    yield
    assert not watch.installed()
    assert dynamo() == before


def test_the_first_call_traces_and_counts() -> None:
    model = stack()
    s = stitched(model, (torch.randn(5, 8),))
    assert (s.tracer.traced, s.tracer.stamped, s.tracer.reasons) == (1, 5, [])
    assert isinstance(model.layers[0], Layer)


@pytest.mark.parametrize("forward", [looks_up, only_looks_up])
@pytest.mark.parametrize(("known", "swap", "stamped"), [(True, False, 5), (True, True, 3), (False, True, 0)])
def test_known_lookups_are_followed(forward: Callable[..., Any], known: bool, swap: bool, stamped: int) -> None:
    model, x = stack(forward), torch.randn(5, 8)
    BY_NAME.update((layer.name, layer) for layer in model.layers)
    if swap:
        BY_NAME["layers.3"], BY_NAME["layers.4"] = BY_NAME["layers.4"], BY_NAME["layers.3"]
    s = stitched(model, (x,), lookups=[name_of] if known else [], tables=[BY_NAME])
    assert against_full_trace(s, model, (x,)) is None
    assert s.tracer.stamped == stamped, s.tracer.reasons


@pytest.mark.parametrize("forward", [inspects, lambda s, x: s.lin(x) * odd(s)])
def test_layers_with_other_functions_that_run_while_tracing_are_traced(forward: Callable[..., Any]) -> None:
    model, x = stack(forward), torch.randn(5, 8)
    s = stitched(model, (x,))
    assert against_full_trace(s, model, (x,)) is None
    assert s.tracer.stamped == 0


def test_reasons_are_readable() -> None:
    s = stitched(stack(lambda s, x: s.lin(x) * s.scale, scale=float), (torch.randn(5, 8),))
    assert "L['self']._modules['layers']._modules['1']: .scale: 0.0 / 1.0" in s.tracer.reasons


def test_fewer_than_least_are_left_alone() -> None:
    model = stack()
    model.layers = model.layers[:2]
    s = stitched(model, (torch.randn(5, 8),))
    assert (s.tracer.traced, s.tracer.stamped) == (0, 0)


def test_hooks_leave_with_the_last_tracer() -> None:
    one, two = Tracer(stack()), Tracer(stack())
    first, second = one.install(), two.install()
    first.__enter__()
    second.__enter__()
    with one.install(), one.install():
        assert watch.installed()
    first.__exit__(None, None, None)  # not in the order they came
    assert watch.installed()
    second.__exit__(None, None, None)


def fails(self: Any, x: Any) -> Any:
    if self.idx == 2:
        raise ValueError("a layer's own error")
    return self.lin(x)


def test_a_failing_trace_leaves_nothing_behind() -> None:
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        stitched(stack(fails), (torch.randn(5, 8),))
    assert not watch.installed()
    model, x = stack(), torch.randn(5, 8)
    assert against_full_trace(stitched(model, (x,)), model, (x,)) is None


def test_a_failing_tracer_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracers, "_stamp", lambda *a: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        stitched(stack(), (torch.randn(5, 8),))


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


def test_graphs_that_differ_within_a_named_tuple_differ() -> None:
    class Pair(NamedTuple):
        node: Any
        number: int

    def graph(names: str, chosen: int) -> fx.Graph:
        made = fx.Graph()
        x = made.placeholder("x")
        functions = zip((torch.neg, torch.abs), names, strict=True)
        nodes = [made.create_node("call_function", function, (x,), name=name) for function, name in functions]
        made.output(Pair(nodes[chosen], 1))
        return made

    x = torch.zeros(1)
    assert difference(graph("ab", 0), [x], graph("ba", 0), [x]) is None
    assert difference(graph("ab", 0), [x], graph("ba", 1), [x]) is not None
