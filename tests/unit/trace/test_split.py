"""Split graphs: what the pieces give together is what the graph gives."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.trace.pieces import World
from vllm_compile_ext.trace.plan import write
from vllm_compile_ext.trace.split import Piece, decompose_sizes, extract, split

SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def is_splitting(node: fx.Node) -> bool:
    return node.target in (torch.sigmoid, torch.split)


def evaluate(pieces: list[Piece], graph: fx.Graph, args: list[Any], run: bool = True) -> Any:
    """The graph by its plan; plain pieces extracted and run, `run` off: their nodes written into the plan."""
    owner = nn.Module()
    plain = [p for p in pieces if not p.splitting]
    sites = [extract(p, owner) for p in plain]
    number = iter(range(len(plain)))
    unique = [None if p.splitting or not run else next(number) for p in pieces]
    made = write(graph, pieces, unique, [])
    return made.load([sites[i] for i in made.calls])([], *args)


@st.composite
def graphs(draw: Any) -> fx.Graph:
    graph = fx.Graph()
    values = [graph.placeholder(f"x{i}") for i in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(1, 12))):
        pick = st.sampled_from(values)
        kind = draw(st.sampled_from(["add", "sigmoid", "relu", "split", "empty", "view", "slice", "in place"]))
        a, b = draw(pick), draw(pick)
        if kind == "add":
            values.append(graph.call_function(torch.add, (a, b)))
        elif kind == "relu":
            values.append(graph.call_method("relu", (a,)))
        elif kind == "sigmoid":
            values.append(graph.call_function(torch.sigmoid, (a,)))
        elif kind == "split":  # a tuple: its getitems stay with it
            made = graph.call_function(torch.split, (a, 2, 1))
            parts = [graph.call_function(operator.getitem, (made, i)) for i in (0, 1)]
            values.append(graph.call_function(torch.cat, (parts, 1)))
        elif kind == "empty":
            made = graph.call_function(torch.empty_like, (a,))
            values.append(graph.call_method("copy_", (made, b)))
        elif kind == "view":
            size = graph.call_method("size", (a,))
            values.append(graph.call_method("view", (b, size)))
        elif kind == "slice":
            size = graph.call_method("size", (a,))
            first = graph.call_function(operator.getitem, (size, 0))
            rest = graph.call_function(operator.getitem, (size, slice(1, None)))
            last = graph.call_function(operator.getitem, (rest, -1))
            values.append(graph.call_method("reshape", (b, (first, last))))
        else:
            made = graph.call_function(torch.add, (a, 1))
            values.append(graph.call_method("add_", (made, b)))
    graph.output(tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))))
    return graph


def annotate(graph: fx.Graph) -> None:
    """example_value for the nodes, of fake tensors with a symbolic first size."""
    world = World()
    inputs = {n: world.tensor(("a", 4)) for n in graph.find_nodes(op="placeholder")}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = inputs[n] if n.op == "placeholder" else super().run_node(n)
            n.meta["example_value"] = value
            return value

    with world.mode:
        Run(fx.GraphModule(nn.Module(), graph)).run(*inputs.values())


def nodes(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op not in ("placeholder", "output")]


@SETTINGS
@given(graphs())
def test_pieces_give_what_the_graph_gives(graph: fx.Graph) -> None:
    args = [torch.randn(3, 4) for _ in graph.find_nodes(op="placeholder")]
    expected = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(*[a.clone() for a in args])
    annotate(graph)
    decompose_sizes(graph)
    graph.lint()
    assert not graph.find_nodes(op="call_method", target="size")
    pieces = split(graph, is_splitting)
    for run in (True, False):
        torch.testing.assert_close(evaluate(pieces, graph, [a.clone() for a in args], run), expected, rtol=0, atol=0)


@SETTINGS
@given(graphs())
def test_pieces_are_the_graph_cut_up(graph: fx.Graph) -> None:
    annotate(graph)
    decompose_sizes(graph)
    pieces = split(graph, is_splitting)
    assert sorted(n.name for p in pieces for n in p.nodes) == sorted(n.name for n in nodes(graph))
    known = set(graph.find_nodes(op="placeholder"))
    for piece in pieces:
        assert piece.nodes
        assert set(piece.inputs) <= known
        assert len(set(piece.inputs)) == len(piece.inputs)
        if not piece.splitting:
            assert not any(is_splitting(n) for n in piece.nodes)
        known |= set(piece.outputs)
    assert set(graph.output_node().all_input_nodes) <= known


def chain(*ops: Any) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for op in ops:
        x = graph.call_function(op, (x,))
    graph.output((x,))
    annotate(graph)
    return graph


def test_neighbouring_splitting_nodes_share_a_piece() -> None:
    pieces = split(chain(torch.relu, torch.sigmoid, torch.sigmoid, torch.relu), is_splitting)
    assert [p.splitting for p in pieces] == [False, True, False]


def test_a_lonely_allocation_joins_the_piece_before() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    z = graph.call_function(torch.sigmoid, (y,))
    out = graph.call_function(torch.empty_like, (y,))
    last = graph.call_function(torch.sigmoid, (z,), {"out": out})
    graph.output((last,))
    pieces = split(graph, is_splitting)
    assert [p.splitting for p in pieces] == [False, True, True]
    assert [n.target for n in pieces[0].nodes] == [torch.relu, torch.empty_like]


def test_extracted_inputs_overlap_when_they_may() -> None:
    from vllm_compile_ext.trace.stitch import STORAGE

    world = World()
    shared = world.tensor(("a", 4))
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(3)]
    for node, number in zip(placeholders, (7, 8, 7), strict=True):  # copies share fake tensors, their tensors need not
        node.meta.update({"example_value": shared, STORAGE: number})
    total = graph.call_function(torch.add, (placeholders[0], placeholders[1]))
    more = graph.call_function(torch.add, (total, placeholders[2]))
    module = extract(Piece(False, [total, more], placeholders, [more]), nn.Module())
    values = [n.meta["example_value"] for n in module.graph.find_nodes(op="placeholder")]
    storages = [v.untyped_storage()._cdata for v in values]
    assert storages[0] == storages[2] != storages[1]
    assert [str(v.shape) for v in values] == [str(shared.shape)] * 3


def test_symbols_come_first() -> None:
    world = World()
    graph = fx.Graph()
    x, size = graph.placeholder("x"), graph.placeholder("size")
    x.meta["example_value"], size.meta["example_value"] = world.tensor(("a", 4)), world.symbol("a")
    y = graph.call_function(torch.relu, (x,))
    graph.output((y,))
    (piece,) = split(graph, is_splitting)
    assert piece.inputs == [size, x]
