"""What the trace of a model has read, in words that another process can check before it uses the code.

Kept are the names of what was accessed, where it all began (the model, globals, attributes of modules, functions that
were traced into), and one line for each value that code could see from there (`trace/values.py`).  A start that wants
to load looks all of it up again, in itself: one line that differs is a miss that names it.
"""

from __future__ import annotations

import enum
import functools
import re
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.fx as fx
from blake3 import blake3
from torch._dynamo.trace_rules import _maybe_init_lazy_module

from vllm_compile_ext import harmless
from vllm_compile_ext.key import readable
from vllm_compile_ext.key.misses import Change, difference
from vllm_compile_ext.trace.same_kind import storage_of
from vllm_compile_ext.trace.values import ALL, ATOMS, WHOLE, Accessed, atom, is_torchs, look


class NotDescribed(Exception):  # noqa: N818 - an answer, not an error
    """Something that the trace read cannot be looked up again; the message says what and why."""


class Seen(msgspec.Struct, frozen=True):
    """What a trace has read.

    by_kind, strings, said, variables: as in `Accessed`, classes by their names.  roots: (module, name) of each global
    and function, of what the graph calls (`_OPERATOR`), and of what was asked of classes (`_IS_ONE_OF`).  digest: of
    the values; lines: the same with their paths, packed, for people.  called: digest of what the graph calls, which a
    piece of it depends on.
    """

    by_kind: dict[str, list[str]]
    strings: list[str]
    said: list[str]
    variables: list[str] | None
    roots: list[tuple[str, str]]
    digest: str
    lines: bytes
    called: str


# These stand for a module in `Seen.roots`: what Python has registered for an operator; whether a class is one of an
# ABC's.
_OPERATOR = "torch.ops of"
_IS_ONE_OF = "isinstance of"
# The name of memory that CPU ranks share begins with a port, another one in each start.  Code gets its handle (vLLM
# 0.32.0, `v1/worker/cpu_worker.py`); it is looked at since other calls have a keyword of its name.
_NAME_OF_RUN = ("vllm.distributed.device_communicators.cpu_communicator._CPUSHMDistributed", ".group_name")
_LONGEST = 200  # characters of a string in the code that may name an attribute; longer ones are documentation
# Their own sources are in the key, and nobody replaces a part of a compiler while it runs.
_COMPILERS = ("torch._dynamo.", "torch._inductor.", "torch._functorch.", "torch.fx.")


def collect(model: torch.nn.Module, tracer: Any, graph: fx.Graph) -> Seen:
    """What the trace of `model` by `tracer`, which gave `graph`, has read.  Raises `NotDescribed`."""
    accessed: Accessed = tracer.accessed
    seen = tracer.seen
    calls = sorted(set(_calls(graph)))
    called = _Description(accessed, with_paths=False)
    for place in calls:
        called.add_root(place)
    roots: list[tuple[str, str]] = list(calls)
    for (module, name), value in seen.globals.items():
        if module is None:
            raise NotDescribed(f"the global {name} of code that is in no module")
        if _is_in_compiler(module):
            continue
        if _find(module, name) is not value and type(value) not in ATOMS:
            raise NotDescribed(f"{module}.{name}, which is another object each time")
        roots.append((module, name))
    roots += [(kind.__module__, f"{kind.__qualname__}.__subclasses__()") for kind in seen.listed]
    for pair in seen.asked:
        name = " ".join(f"{kind.__module__}:{kind.__qualname__}" for kind in pair)
        if _find_classes(name) != pair:
            raise NotDescribed(f"whether {_name(pair[0])} is a {_name(pair[1])}, one of which is not found by its name")
        roots.append((_IS_ONE_OF, name))
    described = _Description(accessed, with_paths=True).add_all(model, roots)
    for function, _ in seen.foreign:
        if function not in tracer.lookups:
            raise NotDescribed(f"what {getattr(function, '__qualname__', function)} did while the model was traced")
    for function in seen.functions.values():
        module = function.__module__ or ""
        if id(function) in described.numbers or _is_in_compiler(module):
            continue
        place = (module, function.__qualname__)
        if _find(*place) is not function:
            raise NotDescribed(f"the function {'.'.join(place)}, which is not found under its name")
        roots.append(place)
        described.add_root(place)
    return Seen(
        by_kind={_name(kind): sorted(found) for kind, found in accessed.by_kind.items() if found},
        strings=sorted(s for s in accessed.strings if len(s) <= _LONGEST),
        said=sorted(s for s in accessed.said if len(s) <= _LONGEST),
        variables=None if accessed.variables is None else sorted(accessed.variables),
        roots=roots,
        digest=_Description(accessed, with_paths=False).add_all(model, roots).digest(),
        lines=zlib.compress(described.text(), 1),
        called=called.digest(),
    )


def _calls(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """What the graph calls without Dynamo having traced into it, but what torch's version stands for."""
    for node in graph.nodes:
        target: Any = node.target
        if node.op == "call_method":
            yield "torch", f"Tensor.{target}"
        elif (name := foreign_operator(target)) is not None:
            yield _OPERATOR, name
        elif isinstance(target, types.FunctionType) and not is_torchs(target.__module__):
            raise NotDescribed(f"what {target.__module__}.{target.__qualname__} does, which is called without a trace")


def foreign_operator(target: Any) -> str | None:
    """The name of an operator that torch's version does not stand for; None for all else that a graph calls."""
    if not isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return None
    name: str = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
    return None if name.startswith(("aten::", "prims::", "prim::")) else name


def _is_in_compiler(module: str) -> bool:
    return f"{module}.".startswith(_COMPILERS)


def changes(seen: Seen, model: torch.nn.Module) -> list[Change]:
    """What is not as it was when `seen` was collected."""
    accessed = Accessed()
    accessed.by_kind = _ByName(seen.by_kind)  # type: ignore[assignment]
    accessed.strings, accessed.said = set(seen.strings), set(seen.said)
    accessed.variables = None if seen.variables is None else set(seen.variables)
    for module in {module.partition(".")[0] for module, _ in seen.roots}:  # Dynamo lets einops fill its tables first
        _maybe_init_lazy_module(types.SimpleNamespace(__module__=module))
    try:
        if _Description(accessed, with_paths=False).add_all(model, seen.roots).digest() == seen.digest:
            return []
        now = _Description(accessed, with_paths=True).add_all(model, seen.roots).text()
    except NotDescribed as why:
        return [Change(str(why), None, None)]
    found = difference(_by_path(zlib.decompress(seen.lines)), _by_path(now))
    # Numbers follow from what came before.
    found = [c for c in found if not ((c.old or "")[:7] == (c.new or "")[:7] == "number ")] or found
    return [_for_people(change) for change in found] or [Change("what the trace read has changed", None, None)]


class _ByName(dict[type | None, frozenset[str]]):
    """`Accessed.by_kind`, from the names of the classes."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        self.names = {kind: frozenset(found) for kind, found in names.items()}

    def __missing__(self, kind: type | None) -> frozenset[str]:
        found = self[kind] = self.names.get(_name(kind), frozenset())
        return found


@functools.cache
def _name(kind: Any) -> str:
    return "" if kind is None else f"{kind.__module__}.{kind.__qualname__}"


def _by_path(text: bytes) -> dict[str, str]:
    lines = (line.partition("\t") for line in text.decode("utf-8", "surrogatepass").split("\n"))
    return {path: rest for path, _, rest in lines}


_FUNCTION = "builtins.function "
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")


def _for_people(change: Change) -> Change:
    """`layers.3.mlp.scale: 1.0 -> 2.0`."""
    name = _STEP.sub(r".\1", change.name).removeprefix(".") or "the model"
    if not all((text or "").startswith(_FUNCTION) for text in change[1:]):
        return Change(f"{name}:", change.old, change.new)
    old, new = (str(text).removeprefix(_FUNCTION).split("'")[1:4:2] for text in change[1:])
    if old == new:
        return Change(f"{name} has other code", None, None)
    return Change(f"{name} is another function (replaced by {'.'.join(new)})", None, None)


def _find(module: str, name: str) -> Any:
    """What is under a name now; None where there is nothing."""
    if module == _OPERATOR:
        return _registered(name)
    if module == _IS_ONE_OF:
        kind, base = _find_classes(name)
        return issubclass(kind, base) if isinstance(kind, type) and isinstance(base, type) else None
    if module in sys.modules:
        found: Any = sys.modules[module]
    else:  # torch.ops.aten and its like
        outer, _, module = module.rpartition(".")
        found = _find(outer, module) if outer else None
    for part in name.split("."):
        found = getattr(found, part.removesuffix("()"), None)
        found = found() if found and part.endswith("()") else found
    return found


def _find_classes(name: str) -> tuple[Any, Any]:
    """The two classes that a name below `_IS_ONE_OF` stands for."""
    kind, base = (_find(*one.split(":")) for one in name.split(" "))
    return kind, base


_KERNEL = re.compile(r"^(\w+)(?:\[alias\])?: registered at (.*):\d+ ::", re.MULTILINE)
_DEVICES = {"CPU", "CUDA", "XPU", "HPU", "MPS", "PrivateUse1"}  # a kernel for these runs with the model only


def _registered(name: str) -> tuple[Any, ...]:
    """What an operator is to a compiler: schemas and tags, and what Python has registered, its fake implementation and
    decompositions.

    Raises `NotDescribed` where a function that cannot be found is run to trace the operator, or to compile it.
    torch 2.13, library.py, _library/simple_registry.py and _decomp/__init__.py.
    """
    from torch._decomp import decomposition_table
    from torch._library.simple_registry import singleton

    whole, (name, _, _) = name, name.partition(".")
    namespace, _, op = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op)
    overloads = [getattr(packet, o) for o in packet.overloads()]
    kernel = singleton.find(name).fake_impl.kernel
    dump = torch._C._dispatch_dump(whole)
    # Of its own operators torch registers gradients through its own functions.
    beside = _DEVICES | {"Autograd"} if re.search(r"^debug: .*/torch/csrc/", dump, re.MULTILINE) else _DEVICES
    for key, file in _KERNEL.findall(dump):
        runs_then = key == "CompositeImplicitAutograd" or (kernel is None and key not in beside)
        if runs_then and _is_python(file):
            raise NotDescribed(f"what the operator {name} is made of")
    about = [(str(o._schema), sorted(map(str, o.tags))) for o in overloads]
    return about, *_unwrapped(kernel and kernel.func), *map(decomposition_table.get, overloads)


def _is_python(file: str) -> bool:
    """Whether a kernel was registered by Python, from there or through torch's own functions for it."""
    if file.endswith((".cpp", ".cc", ".cu", ".h")):
        return False
    place = file.removeprefix(str(Path(torch.__file__).parent))
    return place == file or place.startswith(("/library.py", "/_library/"))


def _unwrapped(function: Any) -> list[Any]:
    """The functions that torch's own wrappers have been put around; the wrappers count how often they run."""
    if not (isinstance(function, types.FunctionType) and is_torchs(function.__module__)):
        return [function]
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    return [found for f in inner if isinstance(f, types.FunctionType) for found in _unwrapped(f)]


class _Description:
    """Values, one line each: what is known of one, after the step that leads to it or the whole path.

    Lines with paths are for people: what is not harmless is hidden in them.  That a value has changed is found without.
    """

    def __init__(self, accessed: Accessed, *, with_paths: bool) -> None:
        self.accessed = accessed
        self.with_paths = with_paths
        self.lines: list[str] = []
        self.numbers: dict[int, int] = {}
        self.storages: dict[int, int] = {}
        self.keep: list[Any] = []

    def text(self) -> bytes:
        return "\n".join(self.lines).encode("utf-8", "surrogatepass")

    def digest(self) -> str:
        return blake3(self.text()).hexdigest()

    def add_all(self, model: torch.nn.Module, roots: list[tuple[str, str]]) -> _Description:
        with torch._C.DisableTorchFunctionSubclass():  # each look at a parameter would ask for it
            self.add("", model)
            for place in roots:
                self.add_root(place)
        return self

    def add_root(self, place: tuple[str, str]) -> None:
        self.add(".".join(place), _find(*place))

    def add(self, path: str, value: Any) -> None:
        """One line for `value`, and then those of its parts."""
        if type(value) in ATOMS:
            self.lines.append(f"{path}\t{self._atom(path, value)}")
            return
        number = self.numbers.get(id(value))
        if number is not None:
            self.lines.append(f"{path}\tnumber {number}")
            return
        kind: Any = type(value)
        if kind is not tuple and kind is not types.MethodType:  # as the interpreter likes, one object or two
            self.numbers[id(value)] = len(self.numbers)
        self.keep.append(value)
        seen = look(value, self.accessed)
        if seen is None:
            raise NotDescribed(f"{path or 'the model'}, a {_name(kind)}")
        head, parts = seen
        words = f"{path}\t{_name(head[0])} {self._head(head)}"
        if issubclass(kind, torch.Tensor):
            words += f" memory {self.storages.setdefault(storage_of(value), len(self.storages))}"
        lines = self.lines
        lines.append(words)
        outer = path if self.with_paths else ""
        for step, part in parts:
            place = outer + (_step(step) if self.with_paths else step)
            if (_name(kind), step) == _NAME_OF_RUN and self._is_only_said(kind, step[1:]):
                lines.append(f"{place}\tof this run")  # no value has this text
            elif type(part) in ATOMS:
                lines.append(f"{place}\t{self._atom(place, part)}")
            else:
                self.add(place, part)
        if _is_heap_type(kind):
            self.add(kind.__qualname__ if self.with_paths else "type", kind)

    def _is_only_said(self, kind: type, name: str) -> bool:
        """Whether code says `name`, but nothing has read it of an object of this class, as far as can be told."""
        known = {*self.accessed.by_kind[kind], *self.accessed.by_kind[None]}
        return not known & {name, ALL, *WHOLE}

    def _atom(self, path: str, value: Any) -> str:
        # Equal only for equal bits: `nan` has many.
        text = repr(value) if value == value else f"{value!r} {atom(value)[1].hex()}"
        shown = not self.with_paths or harmless.is_harmless(value) or _ABOUT_OPERATOR.fullmatch(path)
        return text if shown else _hidden(text)

    def _head(self, head: tuple[Any, ...]) -> str:
        """What is seen of a value itself: of code its names, of others the numbers."""
        text = repr(head[1:])
        shown = not self.with_paths or issubclass(head[0], _CODE) or harmless.is_harmless(head[1:])
        return text if shown else _hidden(text)


# What is seen of these is names of code, dtypes, shapes and devices.
_CODE = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType),
    *(types.MemberDescriptorType, types.CodeType, types.ModuleType, types.GenericAlias, types.UnionType),
    *(type, enum.Enum, np.ufunc, np.dtype),
    *(torch.Tensor, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator),
    torch._library.custom_ops.CustomOpDef,
)
_ABOUT_OPERATOR = re.compile(rf"{_OPERATOR}\.[\w:.]+(\[\d+\])+")  # its schemas and tags
_ITEM = re.compile(r"\[['\"b].*\]", re.DOTALL)  # of a dictionary, by its key


def _hidden(text: str) -> str:
    """What stands for a value in a line.  The short digest only tells which line has changed, and little of it."""
    return f"{harmless.HIDDEN}{readable.digest(text.encode('utf-8', 'surrogatepass'))[:6]}"


def _step(step: str) -> str:
    return step if not _ITEM.fullmatch(step) or harmless.is_key(step[2:-2]) else f"[{_hidden(step)}]"


@functools.cache
def _is_heap_type(kind: Any) -> bool:
    """Whether a class statement made the class of an object that is no class itself."""
    return bool(kind.__flags__ & (1 << 9)) and not issubclass(kind, type)
