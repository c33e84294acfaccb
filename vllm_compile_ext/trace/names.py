"""Names for the functions and constants of a graph: equal names mean the same object, in any process.

`op:aten::add.Tensor` an overload, `packet:aten::add` an op, `fn:torch.nn.functional.linear` a function,
`dtype:float32`, `device:cuda:0`, `layout:strided`, `format:contiguous_format`.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import _get_qualified_name

# Functions are found again only in these modules; in torch itself only the ones that are ops, not `torch.load`.
_MODULES = (
    "_operator",
    "math",
    "torch.functional",
    "torch.nn.functional",
    "torch._C._nn",
    "torch._C._fft",
    "torch._C._linalg",
    "torch._C._special",
)
_SYMBOLIC = ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum")
_BUILTINS = ("abs", "bool", "divmod", "float", "int", "len", "max", "min", "pow", "round", "sum", "getattr")
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "format": torch.memory_format}


class Unnameable(ValueError):  # noqa: N818 - an answer, not an error
    """The object cannot be told by a name; the message says which."""


def name(value: Any) -> str:
    """The name of an op, function, dtype, device, layout or memory format.  Raises `Unnameable`."""
    if isinstance(value, torch._ops.OpOverload):
        return f"op:{value._schema.name}.{value._overloadname}"
    if isinstance(value, torch._ops.OpOverloadPacket):
        return f"packet:{value._qualified_op_name}"
    if isinstance(value, torch._ops.HigherOrderOperator):
        return f"higher:{value.name()}"
    if isinstance(value, torch.device):
        return f"device:{value}"
    for word, kind in _KINDS.items():
        if isinstance(value, kind):
            return f"{word}:{str(value).removeprefix('torch.')}"
    if not callable(value):
        raise Unnameable(f"a {type(value).__name__}")
    try:
        path = _get_qualified_name(value)
        path = path if "." in path else f"builtins.{path}"
        found = _function(path)
    except Exception as error:  # torch's lookup raises many kinds
        raise Unnameable(f"function {value!r}: {error}") from error
    if found is not value:
        raise Unnameable(f"function {value!r}: {path} is another one")
    return f"fn:{path}"


def allowed(name: str) -> bool:
    """Whether `find` will look for a name: a function is to be one of torch's, of operator, math, or a builtin."""
    kind, _, rest = name.partition(":")
    if kind != "fn":
        return kind in ("op", "packet", "device", *_KINDS)
    module, _, last = rest.rpartition(".")
    if module == "builtins":
        return last in _BUILTINS
    if module == "torch":
        return last in _SYMBOLIC or hasattr(torch._C._VariableFunctions, last)
    return module in _MODULES


def find(name: str) -> Any:
    """The object of a name.  Raises `Unnameable` when there is none, or when it is not `allowed`."""
    if not allowed(name):
        raise Unnameable(f"{name} is not among the functions that a plan may use")
    kind, _, rest = name.partition(":")
    try:
        if kind == "fn":
            return _function(rest)
        if kind in ("op", "packet"):
            namespace, _, op = rest.partition("::")
            op, _, overload = op.partition(".")
            packet = getattr(getattr(torch.ops, namespace), op)
            return getattr(packet, overload) if kind == "op" else packet
        found = torch.device(rest) if kind == "device" else getattr(torch, rest)
    except Exception as error:  # also what loading an op's library raises
        raise Unnameable(f"{name}: {error}") from error
    if kind != "device" and not isinstance(found, _KINDS[kind]):
        raise Unnameable(f"{name} is a {type(found).__name__}")
    return found


def _function(path: str) -> Any:
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        return operator.attrgetter(".".join(parts[end:]))(module)
    raise Unnameable(f"{path} is in no module")


def source(argument: Any, node: Callable[[fx.Node], str], constant: Callable[[Any], str]) -> str:
    """An argument of a node as Python text, from which its type can be told: `(v0, 1, 1.0, 'a', )`.

    node: the text of another node; constant: of anything that is neither a literal nor made of such.
    """

    def text(a: Any) -> str:
        if isinstance(a, fx.Node):
            return node(a)
        if type(a) in (tuple, torch.Size):
            items = "".join(f"{text(item)}, " for item in a)
            return f"({items})" if type(a) is tuple else f"Size(({items}))"
        if isinstance(a, list):
            return f"[{', '.join(map(text, a))}]"
        if isinstance(a, dict):
            return "{" + ", ".join(f"{text(key)}: {text(value)}" for key, value in a.items()) + "}"
        if type(a) is slice:
            return f"slice({text(a.start)}, {text(a.stop)}, {text(a.step)})"
        if type(a) is float and repr(a) in ("nan", "inf", "-inf"):
            return f"float({repr(a)!r})"
        if type(a) in (bool, int, float, complex, str, bytes, range, type(None), type(Ellipsis)):
            return repr(a)
        return constant(a)

    return text(argument)
