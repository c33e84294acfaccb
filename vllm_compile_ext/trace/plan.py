"""The plan: one straight Python function that calls the compiled pieces and runs the splitting nodes in between.

A plan is plain data.  With the compiled pieces it is all that a warm start needs.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import marshal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import msgspec
import torch
import torch.fx as fx

from vllm_compile_ext.trace import names
from vllm_compile_ext.trace.call import NotOnce
from vllm_compile_ext.trace.split import Piece
from vllm_compile_ext.trace.stitch import Extra

# A code object means something to the Python that made it and to no other.
PYTHON = f"{sys.implementation.cache_tag} {sys.hexversion:#x}"
Scalar = str | int | float | bool | None


class Made(msgspec.Struct, frozen=True):
    """How an opaque object is made: `ctor` (module, qualified name) called with `args`."""

    ctor: tuple[str, str]
    args: tuple[Scalar, ...] = ()

    def make(self) -> Any:
        """A new object.  Raises `NotOnce` when the constructor is not that of an opaque type."""
        from torch._library.opaque_object import is_opaque_type

        found: Any = importlib.import_module(self.ctor[0])
        for part in self.ctor[1].split("."):
            found = getattr(found, part)
        if not isinstance(found, type) or not is_opaque_type(found):
            raise NotOnce(f"{'.'.join(self.ctor)} is no opaque type")
        return found(*self.args)


class Plan(msgspec.Struct):
    """`source` defines `run(B, *inputs)`, with the objects of the names `constants` as K and the callables of the call
    sites as c0, c1, ...

    `calls[i]` is the number of the unique piece that call site i calls.  `reader` defines `read(root, fixed)`, which
    gives the extras (see `reader_of`); `fixed` are the opaque objects among them, in order.  `code` is what compiling
    the two sources gives in the Python that wrote it: most of what loading a deep model would take.
    """

    source: str
    constants: list[str]
    calls: list[int]
    reader: str = "def read(root, fixed):\n    return []\n"
    fixed: list[Made] = msgspec.field(default_factory=list)
    python: str = ""
    code: bytes = b""

    def _compiled(self) -> tuple[CodeType, CodeType]:
        if self.python != PYTHON:
            codes = compile(self.source, "<plan>", "exec"), compile(self.reader, "<extras>", "exec")
            self.python, self.code = PYTHON, marshal.dumps(codes)
        return marshal.loads(self.code)  # type: ignore[no-any-return]

    def load(self, sites: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
        """`run(extras, *inputs)`: `extras` as the gatherer gives them, `inputs` of the graph that the plan was made of.

        `sites[i]` is called at call site i, with the piece's inputs, and returns the sequence of its outputs.
        Raises `ValueError` when there are not as many as call sites.
        """
        if len(sites) != len(self.calls):
            raise ValueError(f"{len(sites)} callables for {len(self.calls)} call sites")
        space: dict[str, Any] = {"K": list(map(names.find, self.constants)), "Size": torch.Size}
        space.update((f"c{i}", site) for i, site in enumerate(sites))
        exec(self._compiled()[0], space)
        return space["run"]  # type: ignore[no-any-return]

    def gatherer(self, root: torch.nn.Module) -> Callable[[], list[Any]]:
        """A function that gives the values of the extras: tensors read from `root` at each call, so that whatever was
        replaced is seen; opaque objects made now, once.
        """
        space: dict[str, Any] = {}
        exec(self._compiled()[1], space)
        read, fixed = space["read"], [made.make() for made in self.fixed]
        return lambda: read(root, fixed)


def dumps(plan: Plan) -> bytes:
    """A plan as bytes, with its code for the Python that runs now."""
    plan._compiled()
    return msgspec.msgpack.encode(plan)


def loads(data: bytes) -> Plan:
    """The plan of `dumps`.  What is in it will run: check a digest of `data` first.

    Raises `msgspec.DecodeError` for other bytes, `names.Unnameable` for a constant that no plan may use.
    """
    plan = msgspec.msgpack.decode(data, type=Plan)
    for constant in plan.constants:
        names.find(constant)
    return plan


def write(graph: fx.Graph, pieces: Sequence[Piece], unique: Sequence[int | None], extras: Sequence[Extra]) -> Plan:
    """The plan of a stitched and split graph.  Piece i is a call of the unique piece `unique[i]`; None: run its nodes.

    Raises `NotOnce` when a node to run, or a constant of one, has no name that another process could find.
    """
    writer = _Writer(graph, [e.node for e in extras])
    last: dict[fx.Node, int] = {}
    for place, piece in enumerate(pieces):
        last.update(dict.fromkeys((*piece.nodes, *piece.inputs), place))
    for place, (piece, number) in enumerate(zip(pieces, unique, strict=True)):
        if number is None:
            for node in piece.nodes:
                writer.run(node)
        else:
            writer.call(piece, number)
        writer.forget([n for n in (*piece.inputs, *piece.nodes) if last[n] == place])
    if any(type(arg) not in (str, int, float, bool, type(None)) for e in extras for arg in e.args):
        raise NotOnce("a plan cannot hold an argument of an opaque object")
    return Plan(
        writer.finish(),
        list(writer.constants),
        writer.calls,
        reader_of([None if e.ctor else e.expression for e in extras]),
        [Made(e.ctor, e.args) for e in extras if e.ctor],
    )


class _Writer:
    def __init__(self, graph: fx.Graph, extras: list[fx.Node]) -> None:
        self.output = graph.output_node()
        self.keep = set(self.output.all_input_nodes)
        self.lines: list[str] = []
        self.constants: dict[str, str] = {}  # name -> its text in the source
        self.calls: list[int] = []
        self.names: dict[fx.Node, str] = {n: f"B[{i}]" for i, n in enumerate(extras)}
        self.parameters = [n for n in graph.find_nodes(op="placeholder") if n not in self.names]
        self.names.update((n, f"p{i}") for i, n in enumerate(self.parameters))
        self.made = 0

    def _new(self, node: fx.Node) -> str:
        self.names[node] = f"v{self.made}"
        self.made += 1
        return self.names[node]

    def _constant(self, value: Any) -> str:
        try:
            name = names.name(value)
        except names.Unnameable as why:
            raise NotOnce(f"a plan cannot hold {why}") from None
        if not names.allowed(name):
            raise NotOnce(f"a plan cannot hold {name}")
        return self.constants.setdefault(name, f"K[{len(self.constants)}]")

    def _text(self, argument: Any) -> str:
        return names.source(argument, self.names.__getitem__, self._constant)

    def run(self, node: fx.Node) -> None:
        args = [*map(self._text, node.args), *(f"{k}={self._text(v)}" for k, v in node.kwargs.items())]
        if node.op == "call_method":
            self.lines.append(f"{self._new(node)} = {args[0]}.{node.target}({', '.join(args[1:])})")
        elif node.op == "call_function":
            target = self._constant(node.target)
            self.lines.append(f"{self._new(node)} = {target}({', '.join(args)})")
        else:
            raise NotOnce(f"a plan cannot run {node.op} {node.target}")

    def call(self, piece: Piece, number: int) -> None:
        args = ", ".join(self.names[n] for n in piece.inputs)
        outs = "".join(f"{self._new(n)}, " for n in piece.outputs)
        self.lines.append(f"{outs + '= ' if outs else ''}c{len(self.calls)}({args})")
        self.calls.append(number)

    def forget(self, nodes: list[fx.Node]) -> None:
        """Let go of the results in `nodes`, so that memory is free as soon as it would be in a split module."""
        dead = [self.names[n] for n in nodes if n in self.names and n.op != "placeholder" and n not in self.keep]
        if dead:
            self.lines.append(f"del {', '.join(dict.fromkeys(dead))}")

    def finish(self) -> str:
        self.lines.append(f"return {self._text(self.output.args[0])}")
        parameters = ", ".join(["B", *(self.names[n] for n in self.parameters)])
        return f"def run({parameters}):\n" + "".join(f"    {line}\n" for line in self.lines)


def steps(expression: str) -> list[str]:
    """The steps of a chain such as `L['self']._modules['layers'].scale` over L, a frame's locals, as source text.

    The first is the local, `['self']`.  Raises `NotOnce` for anything but a plain chain.
    """
    found: list[str] = []
    try:
        node: ast.expr = ast.parse(expression, mode="eval").body
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute):
                found.append(f".{node.attr}")
            else:
                found.append(f"[{ast.literal_eval(node.slice)!r}]")  # type: ignore[attr-defined]
            node = node.value  # type: ignore[attr-defined]
    except (SyntaxError, AttributeError, ValueError, TypeError):
        raise NotOnce(f"{expression} is no plain chain of attributes and items") from None
    if node.id != "L" or not found or found[-1][0] != "[":
        raise NotOnce(f"{expression} does not start at a local")
    return found[::-1]


def reader_of(expressions: Sequence[str | None]) -> str:
    """Source of `read(root, fixed)`, which evaluates `expressions` anew at each call and gives their values.

    `root` is the one local that all start from; `fixed` has the values for the places that are None.  What several have
    in common is evaluated once a call: 546 parameters of 80 layers take about 0.06 ms.  Nothing on the way is
    remembered: a parameter, an attribute, a closure or a module may be replaced in ways that nobody is told of.
    Raises `NotOnce` when they start from several locals.
    """
    paths = [None if expression is None else tuple(steps(expression)) for expression in expressions]
    uses = Counter(path[:end] for path in paths if path for end in range(1, len(path) + 1))
    roots = [path[0] for path in uses if len(path) == 1]
    if len(roots) > 1:
        raise NotOnce(f"extras of several locals: {', '.join(sorted(roots))}")
    lines: list[str] = []
    texts: dict[tuple[str, ...], str] = {(root,): "root" for root in roots}

    def text(path: tuple[str, ...]) -> str:
        if path not in texts:
            texts[path] = text(path[:-1]) + path[-1]
            if uses[path] > 1:
                lines.append(f"    x{len(lines)} = {texts[path]}\n")
                texts[path] = f"x{len(lines) - 1}"
        return texts[path]

    fixed = itertools.count()
    values = [f"fixed[{next(fixed)}]" if path is None else text(path) for path in paths]
    return f"def read(root, fixed):\n{''.join(lines)}    return [{', '.join(values)}]\n"
