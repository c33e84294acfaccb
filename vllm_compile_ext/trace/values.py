"""What a trace can see of a value: its type, its bits and its parts, in order.

`look` is the one place that knows types.  A type that it does not know has no parts: such a value is equal to itself
only.  Nothing here calls `==`, `hash` or any other method of a value's own class.
"""

from __future__ import annotations

import abc
import collections
import datetime
import decimal
import enum
import functools
import os
import re
import struct
import types
import typing
import weakref
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Look(NamedTuple):
    """head: what can be seen of the value itself, plain data and classes.  parts: (step, value) in order; a step is
    what an access expression has for it (`.scale`, `[0]`), or a word where there is none.
    """

    head: tuple[Any, ...]
    parts: list[tuple[str, Any]]


ALL = "*"  # stands for every attribute
ORDER = "<order of a set>"  # among what was said: the trace may have iterated over a set
# Who reads one of these may read every attribute of the object; what is read by its `__dict__` is told.
WHOLE = frozenset({ALL, "__dir__", "__getstate__", "__reduce__", "__reduce_ex__"})


class Accessed:
    """What a trace may have accessed so far: it has accessed no attribute and no variable that is not in here.

    by_kind: class -> names that were read of an object of exactly this class; None -> of something whose class is not
    known.  strings: all strings in the code that was traced.  said: all names in it, and all that was read.
    variables: those of the environment that were asked for; None for all.
    """

    def __init__(self) -> None:
        self.by_kind: dict[type | None, set[str]] = collections.defaultdict(set)
        self.strings: set[str] = set()
        self.said: set[str] = set()
        self.variables: set[str] | None = set()
        self.changes = 0
        self._names: dict[type, tuple[int, frozenset[str]]] = {}

    def add_code(self, code: types.CodeType) -> None:
        if code not in OWN_OF_MODULES:
            names, strings = names_in(code)
            self._add(self.said, names | strings)
            self._add(self.strings, strings)

    def add(self, kind: type | None, name: str) -> None:
        """`name` was read of an object of class `kind`; None where that is not known."""
        self._add(self.by_kind[kind], {name})
        self._add(self.said, {name})

    def add_order(self) -> None:
        """A set may have been iterated over."""
        self._add(self.said, {ORDER})

    def add_variable(self, name: str | None) -> None:
        """A variable of the environment was asked for; None for all of them."""
        if name is None:
            self.variables = None
        elif self.variables is not None:
            self.variables.add(name)

    def never(self, kind: type, name: str) -> bool:
        """Whether no code has said `name`, or read an object of this class as a whole."""
        whole = self.by_kind[kind] | self.by_kind[None]
        return self.said.isdisjoint({name, name.lstrip("_")}) and whole.isdisjoint(WHOLE)

    def _add(self, known: set[str], names: Set[str]) -> None:
        if not names <= known:
            known |= names
            self.changes += 1

    def select(self, kind: type, own: dict[str, Any]) -> list[tuple[str, Any]]:
        """The attributes among `own`, of an object of class `kind`, that may have been accessed."""
        changes, names = self._names.get(kind, (-1, frozenset()))
        if changes != self.changes:
            names = frozenset({"forward", *self.by_kind[kind], *self.by_kind[None]})
            names = frozenset({ALL}) if not WHOLE.isdisjoint(names) else names | self.strings
            self._names[kind] = self.changes, names
        if ALL in names:
            return list(own.items())
        return [(k, own[k]) for k in own if k in names]


# What nn.Module's own methods read is its structure, or has a name that their caller says.
OWN_OF_MODULES = {f.__code__ for f in vars(torch.nn.Module).values() if isinstance(f, types.FunctionType)}
OWN_OF_MODULES |= {c for code in OWN_OF_MODULES for c in code.co_consts if isinstance(c, types.CodeType)}


@functools.cache
def names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names, and the strings, that `code` and the code inside it say."""
    names, strings = set(code.co_names), set()
    todo: list[Any] = list(code.co_consts)
    while todo:
        const = todo.pop()
        if isinstance(const, str):
            strings.add(const)
        elif isinstance(const, tuple | frozenset):
            todo += const
        elif isinstance(const, types.CodeType):
            inner = names_in(const)
            names |= inner[0]
            strings |= inner[1]
    return frozenset(names), frozenset(strings)


@functools.cache
def code_digest(code: types.CodeType) -> str:
    """Equal for code that does the same, wherever its file is and in which line it begins."""
    constants = [code_digest(c) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts]
    names = code.co_name, code.co_qualname, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    text = repr((names, counts, constants, code.co_code.hex(), code.co_exceptiontable.hex()))  # hex: its repr is quick
    return blake3(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _constant(value: Any) -> Any:
    if isinstance(value, tuple):
        return ("tuple", *map(_constant, value))
    if isinstance(value, frozenset):  # its order is the process's
        return ("frozenset", *sorted(map(repr, map(_constant, value))))
    return atom(value) if type(value) in ATOMS else (type(value).__name__, repr(value))


ATOMS = frozenset({type(None), bool, int, str, bytes, float, complex, type(Ellipsis), type(NotImplemented)})


def is_atom(value: Any) -> bool:
    """Whether a value has nothing but its bits: no identity that code may rely on, and no parts."""
    return type(value) in ATOMS


def atom(value: Any) -> tuple[Any, ...]:
    """The type and the bits of an atom."""
    kind: Any = type(value)
    if kind is float:
        return kind, struct.pack("d", value)
    if kind is complex:
        return kind, struct.pack("dd", value.real, value.imag)
    return kind, value


def look(value: Any, accessed: Accessed) -> Look | None:
    """What the code of a trace could see of `value`; None for a value of an unknown type."""
    kind: Any = type(value)
    return _looker(kind)(value, accessed)


@functools.cache
def _looker(kind: Any) -> Callable[[Any, Accessed], Look | None]:
    """How to look at a value of exactly this type."""
    if kind in ATOMS:
        return lambda v, _: Look(atom(v), [])
    if kind in (set, frozenset):
        return _set
    if kind in _KNOWN:
        return functools.partial(_known, _KNOWN[kind])
    for base, looker in _LOOKERS:
        if issubclass(kind, base):
            return looker
    if issubclass(kind, tuple) and hasattr(kind, "n_sequence_fields"):  # as sys.version_info
        return lambda v, _: Look((kind,), _items(tuple.__iter__(v)))
    if torch.distributed.is_available() and issubclass(kind, torch.distributed.ProcessGroup):
        return lambda v, _: Look((kind, v.group_name, v.size(), v.rank()), [])
    if type(kind).__name__ == "pybind11_type" and hasattr(kind, "__members__"):  # an enum in C++
        return lambda v, _: Look((kind, v.name), [])
    if kind.__module__ == "triton.runtime.jit" and hasattr(kind, "cache_key"):
        return _triton_kernel
    if kind.__module__ == "triton.runtime.autotuner":
        return lambda v, _: Look((kind,), [(f".{k}", x) for k, x in vars(v).items() if k not in _TUNING_NOTES])
    return _object


# What an autotuner notes while it runs (Triton 3.5, runtime/autotuner.py).
_TUNING_NOTES = {"cache", "configs_timings", "best_config", "nargs", "bench_time", "_do_bench"}


def _triton_kernel(kernel: Any, _: Accessed) -> Look:
    """Digest of the kernel's source and of the functions that it calls; the globals that they use."""
    digest = kernel.cache_key  # which finds the globals
    used = getattr(kernel, "used_global_vals", {})
    return Look((type(kernel), digest, sorted((name, repr(value)) for (name, _), (value, _) in used.items())), [])


def _known(known: Callable[[Any], tuple[Any, ...]], value: Any, _: Accessed) -> Look:
    head, parts = known(value)
    return Look((type(value), *head), parts)


def _set(value: Any, accessed: Accessed) -> Look:
    if ORDER not in accessed.said and all(type(v) is str for v in value):
        return Look((type(value), len(value)), _items(sorted(value)))  # whose order is another one in each process
    return Look((type(value), len(value)), _items(value))


def _variables(value: Any, accessed: Accessed) -> Look:
    wanted = sorted(value if accessed.variables is None else accessed.variables)
    coding = [(".encodekey", value.encodekey), (".decodevalue", value.decodevalue)]
    return Look((type(value),), coding + [(f"[{name!r}]", value.get(name)) for name in wanted])


# Where a model's configuration came from (transformers 5, `PreTrainedConfig`, which has a `__getattribute__`).
_ORIGIN = {"_name_or_path", "_commit_hash"}


def _object(value: Any, accessed: Accessed) -> Look | None:
    kind: Any = type(value)
    base = _base(kind)
    if base is None:
        return None
    own: tuple[Any, ...] = ()
    parts: list[tuple[str, Any]] = []
    if base in ATOMS:
        own = atom(_PLAIN_OF[base](value))  # a class may have a method of its own for `float(value)`
    elif base is not object:
        own, parts = _KNOWN[base](value)
    for name, slot in _slots(kind):
        parts.append((f".{name}", _held(functools.partial(slot.__get__, value))))
    attributes = _dict(value)
    if attributes is not None:
        ordinary = base is object and is_ordinary(kind)
        shown = accessed.select(kind, attributes) if ordinary else list(attributes.items())
        if isinstance(value, torch.nn.Module):
            parts += _structure(attributes)
            parts += [(f".{k}", v) for k, v in shown if k not in SEEN]
        else:
            parts += [(f".{k}", v) for k, v in shown if k not in _ORIGIN or not accessed.never(kind, k)]
    return Look((kind, *own), parts)


# Always to be seen: code that iterates over a module says no names of what is in it, and hooks run without being named.
_STRUCTURE = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SEEN = {
    *_STRUCTURE,
    *_HOOKS,
    "_forward_hooks_with_kwargs",  # by the hooks' numbers: seen with each hook
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_non_persistent_buffers_set",  # seen in order: a set of strings has another one in each process
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}


def _structure(module: dict[str, Any]) -> list[tuple[str, Any]]:
    """The parameters, buffers, submodules and hooks of a module, of which `module` is the `__dict__`."""
    parts: list[tuple[str, Any]] = []
    for key in _STRUCTURE:
        if table := module.get(key):
            parts += [(f".{key}[{name!r}]", part) for name, part in table.items()]
    for key in _HOOKS:
        if table := module.get(key):
            with_kwargs = module.get(f"{key}_with_kwargs", ())
            parts += [(f".{key}", (hook, number in with_kwargs)) for number, hook in table.items()]
    if buffers := module.get("_non_persistent_buffers_set"):
        parts.append(("._non_persistent_buffers_set", tuple(sorted(buffers))))
    return parts


def _dict(value: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def _tensor(value: Any, accessed: Accessed) -> Look | None:
    kind: Any = type(value)
    plain = kind is torch.nn.Parameter or kind is torch.Tensor
    if not plain and (is_traceable_wrapper_subclass(value) or not _python(kind)):
        return None
    own = _dict(value) or {}
    # torch 2.13, _dynamo/variables/builder.py: Dynamo marks the parameters that it has traced.
    parts = [(f".{k}", v) for k, v in accessed.select(torch.nn.Parameter, own) if k != "_dynamo_static_input_type"]
    return Look((type(value), *tensor_meta(value)), parts)


def tensor_meta(t: torch.Tensor) -> tuple[Any, ...]:
    """What a trace can see of a tensor's outside: dtype, sizes, strides and offset in elements, device, flags."""
    strided = t.layout == torch.strided
    return (
        str(t.dtype),
        tuple(t.shape),
        tuple(t.stride()) if strided else None,
        t.storage_offset() if strided else 0,
        str(t.device),
        str(t.layout),
        t.requires_grad,
        t.is_conj(),
        t.is_neg(),
        t.is_inference(),
        t.is_leaf,
        t._base is not None,
        t.grad is not None,
    )


class _Empty:
    """Stands for what a slot or a cell holds that holds nothing."""


def _held(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (AttributeError, ValueError):
        return _Empty


def _cell(cell: Any) -> Any:
    return _held(lambda: cell.cell_contents)


_DYNAMOS = ("_torchdynamo_wrapper_id", "_torchdynamo_inline")


def _function(f: Any, accessed: Accessed) -> Look:
    # torch 2.13, _dynamo/eval_frame.py: what `torch.compile` or `disable` makes of a function is traced as that one.
    wrapped = f.__dict__.get("_torchdynamo_orig_callable")
    parts: list[tuple[str, Any]] = [
        (f".{k}", v) for k, v in f.__dict__.items() if k not in _DYNAMOS and (not wrapped or v is wrapped or is_atom(v))
    ]
    if not wrapped:
        parts += [(".__defaults__", f.__defaults__), (".__kwdefaults__", f.__kwdefaults__)]
        parts += [(f".__closure__[{i}].cell_contents", _cell(c)) for i, c in enumerate(f.__closure__ or ())]
    parts += [(f".{name}", getattr(f, name)) for name in ("__doc__", "__annotations__") if name in accessed.said]
    return Look((types.FunctionType, f.__module__, f.__qualname__, f.__name__, code_digest(f.__code__)), parts)


def _items(values: Any) -> list[tuple[str, Any]]:
    return [(f"[{i}]", v) for i, v in enumerate(values)]


def _pairs(values: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    for i, (key, value) in enumerate(values):
        parts += [(f" key {i}", key), (f"[{key!r}]" if type(key) in ATOMS else f" value {i}", value)]
    return parts


def _builtin(f: Any) -> tuple[Any, ...]:
    owner = f.__self__
    bound = owner is not None and not isinstance(owner, types.ModuleType | type)
    bound = bound and not type(owner).__name__.startswith("pybind11_")  # every function of pybind has its record there
    if type(owner) is frozenset and f.__name__ == "__contains__" and all(type(v) is str for v in owner):
        owner = sorted(owner)  # as `keyword.iskeyword`: it cannot tell their order
    return (f.__module__, f.__qualname__), [(".__self__", owner)] if bound else []


def _parts(*steps: str) -> Any:
    return lambda value: ((), [(f".{step}", getattr(value, step)) for step in steps])


def _as(text: Callable[[Any], str]) -> Any:
    return lambda value: ((text(value),), [])


def _descriptor(d: Any) -> tuple[Any, ...]:
    return (d.__objclass__.__module__, d.__objclass__.__qualname__, d.__name__), []


def _sequence(base: Any) -> Any:
    return lambda v: ((base.__len__(v),), _items(base.__iter__(v)))


def _mapping(base: Any) -> Any:
    return lambda v: ((base.__len__(v),), _pairs(base.items(v)))


def _default(v: Any) -> tuple[Any, ...]:
    return (len(v),), [(".default_factory", v.default_factory), *_pairs(collections.defaultdict.items(v))]


_KNOWN: dict[type, Any] = {
    **dict.fromkeys((torch.dtype, torch.device, torch.layout, torch.memory_format), _as(str)),
    **dict.fromkeys((types.GenericAlias, types.UnionType), _as(str)),
    **dict.fromkeys((datetime.date, datetime.datetime, datetime.time, datetime.timedelta, decimal.Decimal), _as(repr)),
    **dict.fromkeys(
        (types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType), _descriptor
    ),
    **dict.fromkeys((types.GetSetDescriptorType, types.MemberDescriptorType), _descriptor),
    range: lambda v: ((v.start, v.stop, v.step), []),
    slice: _parts("start", "stop", "step"),
    list: _sequence(list),
    tuple: _sequence(tuple),
    set: _sequence(set),
    frozenset: _sequence(frozenset),
    dict: _mapping(dict),
    collections.OrderedDict: _mapping(collections.OrderedDict),
    collections.defaultdict: _default,
    collections.deque: lambda v: ((len(v), v.maxlen), _items(collections.deque.__iter__(v))),
    types.MappingProxyType: _mapping(types.MappingProxyType),
    types.SimpleNamespace: lambda v: ((), [(f".{k}", x) for k, x in v.__dict__.items()]),
    types.MethodType: _parts("__func__", "__self__"),
    types.CellType: lambda v: ((), [(".cell_contents", _cell(v))]),
    types.CodeType: lambda v: ((v.co_qualname, code_digest(v)), []),
    types.BuiltinFunctionType: _builtin,
    types.MethodWrapperType: lambda v: ((v.__name__,), [(".__self__", v.__self__)]),
    property: _parts("fget", "fset", "fdel"),
    staticmethod: _parts("__func__"),
    classmethod: _parts("__func__"),
    functools.partial: _parts("func", "args", "keywords", "__dict__"),
    functools.partialmethod: _parts("func", "args", "keywords"),
    functools.cached_property: _parts("func", "attrname"),
    np.ufunc: lambda v: ((v.__name__,), []),
    torch._library.custom_ops.CustomOpDef: lambda v: ((v._qualname,), [("", v._init_fn), ("", v._abstract_fn)]),
    type(functools.lru_cache(lambda: None)): _parts("__wrapped__"),
    re.Pattern: lambda v: ((v.pattern, v.flags), []),
    type(collections.namedtuple("_", ["a"]).__dict__["a"]): lambda v: ((v.__reduce__()[1][0],), []),
    weakref.ref: lambda v: ((), [("()", v())]),
    torch.Size: _sequence(tuple),
}
_BASES = (int, float, str, bytes, complex, list, tuple, set, frozenset, dict, collections.OrderedDict)
_BASES += (collections.defaultdict, collections.deque, types.SimpleNamespace)  # type: ignore[assignment]
_PLAIN_OF: dict[type, Any] = {
    int: int.__index__,
    float: float.__float__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda v: bytes.__getitem__(v, slice(None)),
}
PLAIN_METACLASSES = {type, abc.ABCMeta, enum.EnumType, type(torch.Tensor), type(torch.nn.Parameter)}
_METACLASSES = PLAIN_METACLASSES | {type(typing.Protocol)}
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _is_one_of(kind: Any, kinds: tuple[Any, ...]) -> bool:
    return any(kind is one for one in kinds)  # `in` would ask a metaclass


@functools.cache
def _base(kind: Any) -> type | None:
    """The class with a layout of its own that `kind` comes from, object for none; None where C code holds something."""
    meta: Any = type(kind)
    if meta not in _METACLASSES and not _python(meta):
        return None
    for one in kind.__mro__:
        if _is_one_of(one, (object, typing.Generic, typing.Protocol)):
            continue
        if _is_one_of(one, _BASES):
            return one  # type: ignore[no-any-return]
        if not _python(one):
            return None
    return object


@functools.cache
def _python(kind: Any) -> bool:
    """Whether a class statement made `kind`: what it holds is in its slots and its `__dict__`."""
    if not kind.__flags__ & HEAP_TYPE:
        return kind in (object, type, abc.ABC)
    native = types.MethodDescriptorType | types.WrapperDescriptorType | types.ClassMethodDescriptorType
    slots = vars(kind).get("__slots__", ())
    names = {
        f"_{kind.__name__.lstrip('_')}{s}" if s[:2] == "__" != s[-2:] else s
        for s in ((slots,) if isinstance(slots, str) else slots)
    }
    for name, value in vars(kind).items():
        if isinstance(value, native) and getattr(value, "__objclass__", None) is kind:
            return False
        if isinstance(value, types.MemberDescriptorType) and name not in names:
            return False
        if isinstance(value, types.GetSetDescriptorType) and name not in ("__dict__", "__weakref__"):
            return False
    return True


@functools.cache
def _slots(kind: Any) -> tuple[tuple[str, Any], ...]:
    own = [item for one in kind.__mro__ if one.__flags__ & HEAP_TYPE for item in vars(one).items()]
    return tuple((name, value) for name, value in own if isinstance(value, types.MemberDescriptorType))


# What a class may define without its attributes being read by anything but code that names them.
_HARMLESS = {
    "__init__", "__new__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__",
    "__abstractmethods__", "__parameters__", "__orig_bases__", "__init_subclass__", "__class_getitem__",
    "__subclasshook__", "__call__", "__constants__", "__jit_unused_properties__", "__jit_ignored_attributes__",
    "__static_attributes__", "__firstlineno__", "__type_params__", "__slots__", "__extra_repr__",
    "__non_callable_proto_members__", "__protocol_attrs__", "__post_init__",
}  # fmt: skip


_GENERATED = {"__eq__", "__repr__", "__hash__", "__match_args__", "__dataclass_fields__", "__dataclass_params__"}


def _is_plain_dataclass(kind: type) -> bool:
    """Whether what `kind` defines for Python was made by `dataclass`, and Python runs it only where code asks for it:
    Dynamo traces into it, and no set or dictionary can hold its objects.
    """
    own = vars(kind)
    params, equal = own.get("__dataclass_params__"), own.get("__eq__")
    if params is None or params.frozen or params.order or own.get("__hash__", equal) is not None:
        return False
    return isinstance(equal, types.FunctionType) and equal.__code__.co_filename == "<string>"


# Dynamo traces into these, as into any function, and runs none of them by itself.
_TRACED = {
    "__repr__", "__str__", "__format__", "__len__", "__bool__", "__iter__", "__next__", "__reversed__", "__getitem__",
    "__contains__", "__enter__", "__exit__", "__setattr__", "__delattr__", "__setitem__", "__delitem__",
}  # fmt: skip
_INLINED = (types.FunctionType, staticmethod, classmethod, type, functools.cached_property, functools.partialmethod)


@functools.cache
def is_ordinary(kind: Any) -> bool:
    """Whether attributes of `kind` are read under their names only: no class of it defines a method that Python calls
    by itself, or a descriptor other than functions and properties of functions.
    """
    for one in kind.__mro__:
        bare = _is_one_of(one, (object, torch.nn.Module, typing.Generic, typing.Protocol, abc.ABC))
        if bare or one.__module__.startswith("torch.nn.modules."):
            continue
        harmless = _HARMLESS | _GENERATED if _is_plain_dataclass(one) else _HARMLESS
        for name, value in vars(one).items():
            if name in _TRACED and type(value) is types.FunctionType:
                continue
            if name.startswith("__") and name.endswith("__") and name not in harmless:
                return False
            if isinstance(value, property):
                if not all(f is None or type(f) is types.FunctionType for f in (value.fget, value.fset, value.fdel)):
                    return False
            elif isinstance(value, _INLINED):
                continue
            elif isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType):
                if name not in ("__dict__", "__weakref__"):
                    return False
            elif hasattr(type(value), "__get__") and not isinstance(value, types.BuiltinFunctionType):
                return False
    return True


def is_torchs(module: str | None) -> bool:
    """Whether a module's name is torch's: its sources are a factor of every key."""
    return module == "torch" or str(module).startswith("torch.")


def _class(kind: Any, accessed: Accessed) -> Look:
    """What code finds in `kind` under names that it has said, and methods that Python calls; then its bases.

    Of torch's own classes only `forward`, and what others have put there.
    """
    ours = not is_torchs(kind.__module__)
    parts: list[tuple[str, Any]] = []
    if kind.__flags__ & HEAP_TYPE:
        for name, value in vars(kind).items():
            special = name[:2] == "__" == name[-2:] and name not in _HARMLESS - {"__call__", "__class_getitem__"}
            special = special and isinstance(value, types.FunctionType | classmethod | staticmethod | property)
            if not ours and name != "forward":
                function = getattr(value, "__func__", value)
                special = isinstance(function, types.FunctionType) and not is_torchs(function.__module__)
            said = name in accessed.said or (name[:2] != "__" and issubclass(kind, type))  # a metaclass is not traced
            if name == "forward" or special or (said and (ours or type(value) in ATOMS)):
                parts.append((f".{name}", value))
        parts += [(f".__bases__[{i}]", base) for i, base in enumerate(kind.__bases__)]
    meta: Any = type(kind)
    if meta not in _METACLASSES and not is_torchs(meta.__module__):
        parts.append((".__class__", meta))
    if not accessed.said.isdisjoint({"fields", "asdict", "astuple", "__dataclass_fields__"}):
        for name, field in vars(kind).get("__dataclass_fields__", {}).items():
            parts += [(f".{name}.{step}", getattr(field, step)) for step in ("default", "default_factory", "metadata")]
    return Look((type, kind.__module__, kind.__qualname__, kind.__name__), parts)


# Of a class, or of several, and their subclasses; the first that fits.
_LOOKERS: list[tuple[Any, Callable[[Any, Accessed], Look | None]]] = [
    (torch.Tensor, _tensor),
    (type(os.environ), _variables),
    (types.FunctionType, _function),
    (type, _class),
    (types.ModuleType, lambda v, _: Look((type(v), v.__name__), [])),
    (enum.Enum, lambda v, _: Look((type(v), v._name_), [(".value", v._value_)])),
    (
        np.ndarray,
        lambda v, _: (
            None
            if v.dtype.hasobject or type(v) is not np.ndarray
            else Look((np.ndarray, v.dtype.str, v.shape, v.strides, v.flags.writeable, v.tobytes()), [])
        ),
    ),
    (np.generic, lambda v, _: Look((type(v), v.dtype.str, v.tobytes()), [])),
    (
        (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator),
        lambda v, _: Look((type(v), str(v)), []),
    ),
]
