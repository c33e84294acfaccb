"""The plan: one straight Python function that calls the compiled pieces and runs the splitting nodes in between.

A plan is plain data.  With the compiled pieces it is all that a warm start needs.
"""

from __future__ import annotations

import importlib
import io
import marshal
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext.program.transformed import PYTHON
from vllm_compile_ext.trace import access, names
from vllm_compile_ext.trace.bodies import Extra, NotOnce
from vllm_compile_ext.trace.split import Piece


@dataclass(frozen=True)
class Made:
    """How an opaque object is made: `ctor` (module, qualified name) called with `args`."""

    ctor: tuple[str, str]
    args: tuple[Any, ...] = ()


@dataclass
class Plan:
    """`source` defines `run(B, *inputs)`, with `constants` as K and the callables of the call sites as c0, c1, ...

    `calls[i]` is the number of the unique piece that call site i calls.  `reader` defines `read(root, fixed)`, which
    gives the extras (see `access.reader`); `fixed` are the opaque objects among them, in order.
    """

    source: str
    constants: list[Any]
    calls: list[int]
    reader: str = "def read(root, fixed):\n    return []\n"
    fixed: list[Made] = field(default_factory=list)
    # What compiling the two sources gives; a plan of bytes brings it along.
    code: tuple[CodeType, CodeType] | None = None

    def compiled(self) -> tuple[CodeType, CodeType]:
        """The code of `source` and of `reader`."""
        if self.code is None:
            self.code = compile(self.source, "<plan>", "exec"), compile(self.reader, "<extras>", "exec")
        return self.code

    def load(self, sites: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
        """`run(extras, *inputs)`: `extras` as the gatherer gives them, `inputs` of the graph that the plan was made of.

        `sites[i]` is called at call site i, with the piece's inputs, and returns the sequence of its outputs.
        Raises `ValueError` when there are not as many as call sites.
        """
        if len(sites) != len(self.calls):
            raise ValueError(f"{len(sites)} callables for {len(self.calls)} call sites")
        space: dict[str, Any] = {"K": self.constants, **{f"c{i}": site for i, site in enumerate(sites)}}
        exec(self.compiled()[0], space)
        return space["run"]  # type: ignore[no-any-return]

    def gatherer(self, root: torch.nn.Module) -> Callable[[], list[Any]]:
        """A function that gives the values of the extras: tensors read from `root` at each call, so that whatever was
        replaced is seen; opaque objects made now, once.

        Raises `NotOnce` when a constructor is not that of an opaque type.
        """
        space: dict[str, Any] = {}
        exec(self.compiled()[1], space)
        read, fixed = space["read"], [_construct(made) for made in self.fixed]
        return lambda: read(root, fixed)


def _construct(made: Made) -> Any:
    from torch._library.opaque_object import is_opaque_type

    found: Any = importlib.import_module(made.ctor[0])
    for part in made.ctor[1].split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or not is_opaque_type(found):
        raise NotOnce(f"{'.'.join(made.ctor)} is no opaque type")
    return found(*made.args)


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
    source = writer.finish()
    reader = access.reader([None if e.ctor else e.expression for e in extras])
    fixed = [Made(e.ctor, e.args) for e in extras if e.ctor]
    return Plan(source, writer.constants, writer.calls, reader, fixed)


class _Writer:
    def __init__(self, graph: fx.Graph, extras: list[fx.Node]) -> None:
        self.output = graph.output_node()
        self.keep = set(self.output.all_input_nodes)
        self.lines: list[str] = []
        self.constants: list[Any] = []
        self.calls: list[int] = []
        self.places: dict[Any, str] = {}
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
        if name not in self.places:
            self.places[name] = f"K[{len(self.constants)}]"
            self.constants.append(value)
        return self.places[name]

    def _ref(self, a: Any) -> str:
        if isinstance(a, fx.Node):
            return self.names[a]
        if isinstance(a, tuple):
            return f"({''.join(f'{self._ref(i)}, ' for i in a)})"
        if isinstance(a, list):
            return f"[{', '.join(map(self._ref, a))}]"
        if isinstance(a, dict):
            return "{" + ", ".join(f"{self._ref(k)}: {self._ref(v)}" for k, v in a.items()) + "}"
        if isinstance(a, slice):
            return f"slice({self._ref(a.start)}, {self._ref(a.stop)}, {self._ref(a.step)})"
        if type(a) is float and repr(a) in ("nan", "inf", "-inf"):
            return f"float({repr(a)!r})"
        if type(a) in (bool, int, float, complex, str, bytes, type(None), type(Ellipsis)):
            return repr(a)
        return self._constant(a)

    def run(self, node: fx.Node) -> None:
        args = [*map(self._ref, node.args), *(f"{k}={self._ref(v)}" for k, v in node.kwargs.items())]
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
        self.lines.append(f"return {self._ref(self.output.args[0])}")
        parameters = ", ".join(["B", *(self.names[n] for n in self.parameters)])
        return f"def run({parameters}):\n" + "".join(f"    {line}\n" for line in self.lines)


def dumps(plan: Plan) -> bytes:
    """A plan as bytes, for the Python that runs now.  Ops, functions, dtypes and devices are in it by name."""
    out = io.BytesIO()
    fixed = [(made.ctor, made.args) for made in plan.fixed]
    code = marshal.dumps(plan.compiled())  # compiling is most of what loading a deep model would take
    _Pickler(out, protocol=5).dump((plan.source, plan.constants, plan.calls, plan.reader, fixed, PYTHON, code))
    return out.getvalue()


def loads(data: bytes) -> Plan:
    """The plan of `dumps`.  Raises `pickle.UnpicklingError` for anything that no plan holds.

    What is in it will run: check a digest of `data` first.
    """
    try:
        source, constants, calls, reader, fixed, python, code = _Unpickler(io.BytesIO(data)).load()
        made = [Made(*one) for one in fixed]
        return Plan(source, constants, calls, reader, made, marshal.loads(code) if python == PYTHON else None)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged pickles raise many kinds
        raise pickle.UnpicklingError(f"not a plan: {error}") from error


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, str | int | float | bool | list | tuple | dict | bytes | complex | type(None)):
            return None
        return names.name(obj)


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        try:
            return names.find(pid)
        except (names.Unnameable, AttributeError) as why:
            raise pickle.UnpicklingError(f"a plan that needs {pid}: {why}") from why

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "complex"):
            return complex
        raise pickle.UnpicklingError(f"a plan holds no {module}.{name}")
