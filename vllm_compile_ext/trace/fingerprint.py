"""A structural fingerprint of a piece: pieces with equal fingerprints may share compiled code.

It depends on ops, constants with their types, wiring, order (and so on what mutates when), outputs, and on what is
known of the inputs: sizes, strides, offset, dtype, device, layout, grad; how symbols relate, their ranges and what the
trace has assumed of them; which inputs may overlap.  It does not depend on the names of nodes, parameters or symbols,
nor on the data of tensors, on the name that a layer-name object holds, or on where in the model the piece is.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Any

import sympy
import torch
import torch.fx as fx
from blake3 import blake3
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_compile_ext.trace import names
from vllm_compile_ext.trace.signature import storage
from vllm_compile_ext.trace.split import Piece, attribute, value_of
from vllm_compile_ext.trace.stitch import STORAGE

_READABLE = ("cpu", torch.strided)
_LARGEST_CONSTANT = 4096  # bytes of a constant tensor that are put into the text


class Unfingerprintable(Exception):  # noqa: N818 - an answer, not an error
    """The piece holds something whose identity cannot be told: it must be compiled on its own."""


def fingerprint(piece: Piece, owner: torch.nn.Module, extra: Iterable[str] = ()) -> str:
    """64 hexadecimal digits.  `owner` has what get_attr nodes name, `extra` is configuration that changes lowering.

    Raises `Unfingerprintable`.
    """
    return blake3("\n".join(text(piece, owner, extra)).encode()).hexdigest()


def text(piece: Piece, owner: torch.nn.Module, extra: Iterable[str] = ()) -> list[str]:
    """The lines that are digested, for people who ask why two pieces are not equal."""
    writer = _Writer(owner)
    lines = [f"extra {e!r}" for e in extra]
    lines += [writer.input(node) for node in piece.inputs]
    lines += [writer.node(node) for node in piece.nodes]
    lines += [f"out {writer.ref(node)} {writer.value(value_of(node))}" for node in piece.outputs]
    return lines + writer.symbols.facts()


class _Symbols:
    """Symbols by order of appearance.  Where one expression brings several, their names order them: at worst a miss."""

    def __init__(self) -> None:
        self.names: dict[Any, sympy.Symbol] = {}
        self.texts: dict[Any, str] = {}
        self.env: Any = None

    def expression(self, value: Any) -> str:
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return repr(value)
        expr, self.env = value.node.expr, value.node.shape_env
        if expr not in self.texts:
            for symbol in sorted(expr.free_symbols, key=str):
                self.names.setdefault(symbol, sympy.Symbol(f"${len(self.names)}"))
            self.texts[expr] = sympy.srepr(expr.xreplace(self.names))
        return self.texts[expr]

    def facts(self) -> list[str]:
        """A line for each symbol, and one for each assumption of the trace about them alone."""
        lines = []
        for symbol, name in self.names.items():
            bounds = self.env.var_to_range.get(symbol)
            known = sorted((k, v) for k, v in symbol.assumptions0.items())
            unbacked = self.env.is_unbacked_symint(symbol)
            lines.append(f"symbol {name} {bounds and (str(bounds.lower), str(bounds.upper))} {unbacked} {known}")
        if self.names:
            own = set(self.names)
            assumed = {g.expr for g in self.env.guards if g.expr.free_symbols and g.expr.free_symbols <= own}
            lines += sorted(f"assumed {sympy.srepr(e.xreplace(self.names))}" for e in assumed)
        return lines


class _Writer:
    def __init__(self, owner: torch.nn.Module) -> None:
        self.owner = owner
        self.symbols = _Symbols()
        self.numbers: dict[fx.Node, str] = {}
        self.storages: dict[Any, int] = {}

    def input(self, node: fx.Node) -> str:
        self.numbers[node] = f"%{len(self.numbers)}"
        return f"in {self.value(value_of(node))} storage {self._storage(node)}"

    def _storage(self, node: fx.Node) -> int | None:
        """Number of a tensor's storage within the piece: inputs that may overlap have the same."""
        fake = storage(node)
        if fake is None:
            return None
        number = node.meta.get(STORAGE)
        return self.storages.setdefault(("fake", fake) if number is None else ("real", number), len(self.storages))

    def node(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            line = f"attribute {self.attribute(attribute(self.owner, str(node.target)), str(node.target))}"
        elif node.op in ("call_function", "call_method"):
            kwargs = ", ".join(f"{k}={self.ref(v)}" for k, v in sorted(node.kwargs.items()))
            line = f"{node.op} {self.target(node)} {self.ref(node.args)} {kwargs}"
        else:
            raise Unfingerprintable(f"a {node.op} node, {node.name}")
        if custom := node.meta.get("custom"):  # torch.fx.traceback.annotate: streams, regions compiled in another way
            line += f" custom {custom!r}"
        self.numbers[node] = f"%{len(self.numbers)}"
        return line

    def target(self, node: fx.Node) -> str:
        if isinstance(node.target, str):
            return f"method:{node.target}"
        if isinstance(node.target, torch._ops.HigherOrderOperator) and "triton_kernel" in node.target.name():
            # Kernel and constants are numbers of a table of this process (torch 2.13.0, `triton_kernel_wrap.py`).
            raise Unfingerprintable(f"a Triton kernel of the model's own, {node.name}")
        try:
            found = names.name(node.target)
        except names.Unnameable as why:
            raise Unfingerprintable(f"target {why}") from None
        if isinstance(node.target, torch._ops.OpOverload):  # what it mutates is in its schema
            return f"{found} {node.target._schema}"
        return found

    def value(self, value: Any) -> str:
        """What is known of an input or output."""
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or is_traceable_wrapper_subclass(value):
                raise Unfingerprintable(f"a tensor of layout {value.layout}, type {type(value).__name__}")
            sizes = " ".join(map(self.symbols.expression, value.shape))
            strides = " ".join(map(self.symbols.expression, value.stride()))
            offset = self.symbols.expression(value.storage_offset())
            flags = f"{value.requires_grad} {value.is_conj()} {value.is_neg()}"
            kind = type(value)
            return (
                f"tensor {kind.__module__}.{kind.__qualname__} {value.dtype} {value.device} "
                f"[{sizes}] [{strides}] {offset} {flags}"
            )
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return f"{type(value).__name__} {self.symbols.expression(value)}"
        if type(value) in (int, float, bool, complex, str, bytes, type(None)):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, tuple | list):
            return f"{type(value).__name__} ({', '.join(map(self.value, value))})"
        real = type(getattr(value, "real_obj", value))
        return f"object {real.__module__}.{real.__qualname__} {getattr(value, 'script_class_name', '')}"

    def ref(self, a: Any) -> str:
        """An argument: a node's number, or a constant with its type."""
        if isinstance(a, fx.Node):
            return self.numbers[a]
        if isinstance(a, tuple) and type(a) in (tuple, torch.Size):
            return f"{type(a).__name__}({', '.join(map(self.ref, a))})"
        if isinstance(a, list):
            return f"[{', '.join(map(self.ref, a))}]"
        if isinstance(a, dict):
            return "{" + ", ".join(f"{self.ref(k)}: {self.ref(v)}" for k, v in a.items()) + "}"
        if isinstance(a, slice):
            return f"slice({self.ref(a.start)}, {self.ref(a.stop)}, {self.ref(a.step)})"
        if isinstance(a, range):
            return repr(a)
        if isinstance(a, enum.Enum):
            return f"enum {type(a).__module__}.{type(a).__qualname__}.{a.name}"
        if type(a) is float and math.isnan(a):
            return "float nan"
        if type(a) in (bool, int, float, complex, str, bytes, type(None), type(Ellipsis)):
            return f"{type(a).__name__} {a!r}"
        if isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.value(a)
        try:
            return names.name(a)
        except names.Unnameable as why:
            raise Unfingerprintable(f"constant {why}") from None

    def attribute(self, value: Any, path: str) -> str:
        if isinstance(value, fx.GraphModule):
            return self._subgraph(value)
        if type(value) in (torch.Tensor, torch.nn.Parameter) and (value.device.type, value.layout) == _READABLE:
            data = value.detach().contiguous().flatten()
            if data.nbytes <= _LARGEST_CONSTANT:
                return f"constant {self.value(value)} {data.view(torch.uint8).numpy().tobytes().hex()}"
        raise Unfingerprintable(f"attribute {path}, a {type(value).__name__}")

    def _subgraph(self, module: fx.GraphModule) -> str:
        """The graph that a higher-order op runs; its own attributes are its owner's."""
        inner = _Writer(module)
        inner.symbols = self.symbols
        lines = []
        for node in module.graph.nodes:
            if node.op == "placeholder":
                lines.append(inner.input(node))
            elif node.op == "output":
                lines.append(f"out {inner.ref(node.args[0])}")
            else:
                lines.append(inner.node(node))
        return f"graph {{{'; '.join(lines)}}}"
