"""Cut a graph at splitting ops into pieces, in one pass and without copying a node.

A piece is a run of nodes with its inputs and outputs; only a piece that gets compiled is made into a GraphModule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext.trace.call import NotOnce, storage, value_of
from vllm_compile_ext.trace.stitch import STORAGE


@dataclass
class Piece:
    """`nodes` run with `inputs`, nodes from outside, and give `outputs` to later pieces or the graph's result.

    `inputs` are in order of first use, after the symbols of their sizes; `outputs` in order of execution.
    """

    splitting: bool
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


def decompose_sizes(graph: fx.Graph) -> None:
    """`x.size()` gives a torch.Size, which cannot cross pieces: use a node or constant for each dimension, in place."""
    for node in list(graph.find_nodes(op="call_method", target="size")):
        shape = getattr(value_of(node.args[0]), "shape", None) if len(node.args) == 1 else None
        if shape is None or node.kwargs:
            continue
        dims: list[Any] = list(shape)
        with graph.inserting_before(node):
            for i, size in enumerate(shape):
                if isinstance(size, torch.SymInt):
                    dims[i] = graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], i))
                    dims[i].meta["example_value"] = size
        _replace(graph, node, tuple(dims))
        for made in dims:
            if isinstance(made, fx.Node) and not made.users:
                graph.erase_node(made)


def _replace(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Let the users of `node` use `value`, a size or a tuple of sizes; a method of a tuple (`numel`) keeps the node."""
    for user in list(node.users):
        if isinstance(value, tuple) and user.op == "call_method" and user.args[0] is node:
            continue
        index = user.args[1] if isinstance(value, tuple) and user.target is operator.getitem else None
        bounds = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
        if index is not None and all(b is None or isinstance(b, int) for b in bounds):
            _replace(graph, user, value[index])
        else:
            user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)
    if not node.users:
        graph.erase_node(node)


_ALLOCATING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


def _allocates(node: fx.Node) -> bool:
    """Whether a node only makes a tensor whose data nobody has written yet."""
    if node.op == "call_method":
        return bool(node.target == "new_empty")
    if node.target in (torch.empty, torch.empty_like, torch.empty_strided):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.name in _ALLOCATING)
    return str(getattr(node.target, "_qualified_op_name", "")) in _ALLOCATING


def split(graph: fx.Graph, is_splitting: Callable[[fx.Node], bool]) -> list[Piece]:
    """The pieces in order of execution.

    Neighbouring splitting nodes share a piece, a getitem stays with its tuple, and a buffer that is allocated between
    two splitting pieces is allocated by the plain piece before.  `decompose_sizes` comes first.
    """
    pieces = [Piece(splitting=False)]
    where: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0] in where:
            home = where[node.args[0]]
        else:
            cut = is_splitting(node)
            if cut != pieces[-1].splitting:
                pieces.append(Piece(cut))
            home = len(pieces) - 1
        pieces[home].nodes.append(node)
        where[node] = home
    _merge_allocations(pieces, where)
    for place, piece in enumerate(pieces):
        inputs: dict[fx.Node, None] = {}
        for node in piece.nodes:
            inputs.update(dict.fromkeys(n for n in node.all_input_nodes if where.get(n) != place))
            if any(where.get(user) != place for user in node.users):
                piece.outputs.append(node)
        piece.inputs = list(inputs)
    pieces = [p for p in pieces if p.nodes]
    _add_symbols(graph, pieces)
    return pieces


def _merge_allocations(pieces: list[Piece], where: dict[fx.Node, int]) -> None:
    before: int | None = None
    for place, piece in enumerate(pieces):
        if piece.splitting:
            continue
        if before is not None and len(piece.nodes) == 1:
            node, earlier = piece.nodes[0], before
            if _allocates(node) and all(where.get(n, -1) <= earlier for n in node.all_input_nodes):
                pieces[earlier].nodes.append(node)
                piece.nodes.clear()
                where[node] = earlier
                continue
        before = place


def _add_symbols(graph: fx.Graph, pieces: list[Piece]) -> None:
    """Put the graph inputs that carry the symbols of a plain piece's input sizes before its other inputs."""
    carriers: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(value := value_of(node), torch.SymInt):
            carriers.setdefault(value.node.expr, node)
    for piece in pieces:
        if not piece.splitting:
            needed = dict.fromkeys(s for node in piece.inputs for s in _symbols(value_of(node)))
            piece.inputs = list(dict.fromkeys([*(carriers[s] for s in needed if s in carriers), *piece.inputs]))


def _symbols(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        for size in (*value.shape, *value.stride()):
            if isinstance(size, torch.SymInt):
                yield from sorted(size.node.expr.free_symbols, key=str)


def extract(piece: Piece, owner: torch.nn.Module) -> fx.GraphModule:
    """The piece as a GraphModule: placeholders `arg0`, ... with meta["example_value"], one output, a tuple.

    `owner` has what get_attr nodes name.  Inputs that may overlap get fake tensors that share a storage, and only they.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    stand_ins = _StandIns()
    for i, node in enumerate(piece.inputs):
        env[node] = graph.placeholder(f"arg{i}")
        env[node].meta["example_value"] = stand_ins.fake_for(node)
    for node in piece.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    out = graph.output(tuple(env[n] for n in piece.outputs))
    out.meta["example_value"] = tuple(value_of(n) for n in piece.outputs)
    paths = [str(n.target) for n in piece.nodes if n.op == "get_attr"]
    attributes = {path: operator.attrgetter(path)(owner) for path in paths}
    return fx.GraphModule(attributes or torch.nn.Module(), graph)


class _StandIns:
    """Fake tensors for the inputs of one piece.  Stitched copies share fake tensors, real tensors may not."""

    def __init__(self) -> None:
        self.first: dict[int, torch.Tensor] = {}  # number of a storage (stitch.STORAGE) -> the first input in it
        self.taken: set[int] = set()  # fake storages of these

    def fake_for(self, node: fx.Node) -> Any:
        value, number, fake = value_of(node), node.meta.get(STORAGE), storage(node)
        if number is None or fake is None:
            return value
        if number in self.first:  # overlaps an earlier input
            first = self.first[number]
            if first.untyped_storage()._cdata == fake:
                return value
            if first.dtype != value.dtype:
                raise NotOnce("inputs of a piece overlap with different dtypes")
            with first.fake_mode:
                return first.as_strided(value.shape, value.stride(), value.storage_offset())
        if fake in self.taken:  # of a tensor that does not overlap
            value = _like(value)
        self.first[number] = value
        self.taken.add(value.untyped_storage()._cdata)
        return value


def _like(value: Any) -> Any:
    """A fake tensor with a storage of its own."""
    spans = ((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    with value.fake_mode:
        if value.storage_offset() == 0:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        else:
            whole = torch.empty(value.storage_offset() + sum(spans, 1), dtype=value.dtype, device=value.device)
            made = whole.as_strided(value.shape, value.stride(), value.storage_offset())
    return made.requires_grad_() if value.requires_grad else made
