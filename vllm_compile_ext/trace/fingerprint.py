"""A structural fingerprint of a piece: pieces with equal fingerprints may share compiled code.

It depends on ops, constants with their types, wiring, order (and so on what mutates when), outputs, and on what is
known of the inputs: sizes, strides, offset, dtype, device, layout, grad; how symbols relate, their ranges and what the
trace has assumed of them; which inputs may overlap.  It does not depend on the names of nodes, parameters or symbols,
nor on the data of tensors, on the name that a layer-name object holds, or on where in the model the piece is.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
import torch.fx as fx
from blake3 import blake3
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_compile_ext.trace import names
from vllm_compile_ext.trace.call import storage, value_of
from vllm_compile_ext.trace.split import Piece
from vllm_compile_ext.trace.stitch import STORAGE

_READABLE = ("cpu", torch.strided)
_LARGEST_CONSTANT = 4096  # bytes of a constant tensor that are put into the text


class Unfingerprintable(Exception):  # noqa: N818 - an answer, not an error
    """The piece holds something whose identity cannot be told: it must be compiled on its own."""


def fingerprint(piece: Piece, owner: torch.nn.Module, extra: Iterable[str] = ()) -> str:
    """64 hexadecimal digits.  `owner` has what get_attr nodes name, `extra` is configuration that changes lowering.

    Raises `Unfingerprintable`.
    """
    writer = _Writer(owner, _Symbols())
    lines = [f"extra {e!r}" for e in extra]
    lines += [writer.input(node) for node in piece.inputs]
    try:
        lines += [writer.node(node) for node in piece.nodes]
    except names.Unnameable as why:
        raise Unfingerprintable(f"it holds {why}") from None
    lines += [f"out {writer.argument(node)} {writer.value(value_of(node))}" for node in piece.outputs]
    lines += writer.symbols.facts()
    return blake3("\n".join(lines).encode()).hexdigest()


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
    def __init__(self, owner: torch.nn.Module, symbols: _Symbols) -> None:
        self.owner = owner
        self.symbols = symbols
        self.numbers: dict[fx.Node, str] = {}
        self.storages: dict[Any, int] = {}

    def input(self, node: fx.Node) -> str:
        self._number(node)
        fake, number = storage(node), None
        if fake is not None:  # inputs that may overlap have the same number
            real = node.meta.get(STORAGE)
            number = self.storages.setdefault(("fake", fake) if real is None else ("real", real), len(self.storages))
        return f"in {self.value(value_of(node))} storage {number}"

    def node(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            line = f"attribute {self._attribute(str(node.target))}"
        elif node.op in ("call_function", "call_method"):
            kwargs = ", ".join(f"{k}={self.argument(v)}" for k, v in sorted(node.kwargs.items()))
            line = f"{node.op} {self._target(node)} {self.argument(node.args)} {kwargs}"
        else:
            raise Unfingerprintable(f"a {node.op} node, {node.name}")
        if custom := node.meta.get("custom"):  # torch.fx.traceback.annotate: streams, regions compiled in another way
            line += f" custom {custom!r}"
        self._number(node)
        return line

    def _number(self, node: fx.Node) -> None:
        self.numbers[node] = f"%{len(self.numbers)}"

    def _target(self, node: fx.Node) -> str:
        target = node.target
        if isinstance(target, str):
            return f"method:{target}"
        if isinstance(target, torch._ops.HigherOrderOperator) and "triton_kernel" in target.name():
            # Kernel and constants are numbers of a table of this process (torch 2.13.0, `triton_kernel_wrap.py`).
            raise Unfingerprintable(f"a Triton kernel of the model's own, {node.name}")
        name = names.name(target)
        # What an operator mutates is in its schema.
        return f"{name} {target._schema}" if isinstance(target, torch._ops.OpOverload) else name

    def value(self, value: Any) -> str:
        """What is known of an input or output."""
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or is_traceable_wrapper_subclass(value):
                raise Unfingerprintable(f"a tensor of layout {value.layout}, type {type(value).__name__}")
            sizes = " ".join(map(self.symbols.expression, value.shape))
            strides = " ".join(map(self.symbols.expression, value.stride()))
            offset = self.symbols.expression(value.storage_offset())
            flags = f"{value.requires_grad} {value.is_conj()} {value.is_neg()}"
            return f"tensor {_name(type(value))} {value.dtype} {value.device} [{sizes}] [{strides}] {offset} {flags}"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return f"{type(value).__name__} {self.symbols.expression(value)}"
        if type(value) in (int, float, bool, complex, str, bytes, type(None)):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, tuple | list):
            return f"{type(value).__name__} ({', '.join(map(self.value, value))})"
        real = type(getattr(value, "real_obj", value))
        return f"object {_name(real)} {getattr(value, 'script_class_name', '')}"

    def argument(self, argument: Any) -> str:
        return names.source(argument, self.numbers.__getitem__, self._constant)

    def _constant(self, value: Any) -> str:
        if isinstance(value, enum.Enum):
            return f"enum {_name(type(value))}.{value.name}"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.value(value)
        return names.name(value)

    def _attribute(self, path: str) -> str:
        value = operator.attrgetter(path)(self.owner)
        if isinstance(value, fx.GraphModule):  # what a higher-order op runs; its own attributes are its owner's
            inner = _Writer(value, self.symbols)
            *nodes, output = value.graph.nodes
            lines = [inner.input(n) if n.op == "placeholder" else inner.node(n) for n in nodes]
            return f"graph {{{'; '.join(lines)}; out {inner.argument(output.args[0])}}}"
        if type(value) in (torch.Tensor, torch.nn.Parameter) and (value.device.type, value.layout) == _READABLE:
            data = value.detach().contiguous().flatten()
            if data.nbytes <= _LARGEST_CONSTANT:
                return f"constant {self.value(value)} {data.view(torch.uint8).numpy().tobytes().hex()}"
        raise Unfingerprintable(f"attribute {path}, a {type(value).__name__}")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
