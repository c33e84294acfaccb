"""Compare two modules attribute by attribute: the over-approximation that decides which layers may share a trace.

`compare(a, b)` walks everything reachable from the two modules in lock step and answers with the objects that
correspond to each other and the attributes whose values differ.  An object that is one and the same on both sides is
shared by them and not entered.  The data of tensors is never looked at.
"""

from __future__ import annotations

import enum
import functools
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Unlike(Exception):  # noqa: N818 - an answer, not an error
    """The two modules differ in structure; the message says where."""


@dataclass
class Difference:
    """One attribute or item that differs: a trace that reads `key` of `owner` (on the left) holds for one side only.

    `path` is the access expression below the module, such as `.attn.scale` or `._modules['mlp']`.
    """

    owner: Any
    key: Any
    path: str
    left: Any
    right: Any


@dataclass
class Comparison:
    """`pairs`: id of an object of the left side -> its counterpart's, for objects that are not shared by both sides.
    `tensors`: id of a left tensor -> (access path, the right tensor), among them only the ones in `pairs`.
    `rights`: ids of all counterparts.  `keep` holds what the ids belong to.
    """

    pairs: dict[int, int] = field(default_factory=dict)
    rights: dict[int, int] = field(default_factory=dict)
    tensors: dict[int, tuple[str, torch.Tensor]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)

    def by_key(self) -> dict[Any, list[Difference]]:
        """The differences under the last step of their path."""
        table: dict[Any, list[Difference]] = {}
        for d in self.differences:
            table.setdefault(d.key, []).append(d)
        return table


_ATOMS = (
    int,
    float,
    bool,
    str,
    bytes,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
    enum.Enum,
    range,
    slice,
)

# What holds no references to layers of its own: the same on both sides, it says nothing.
_IMMUTABLE = (*_ATOMS, type, types.ModuleType, types.BuiltinFunctionType, types.CodeType)

# A difference here is one of structure.  Hooks run around `forward`, where no read of an attribute need show.
_STRUCTURE = ("_modules", "_parameters", "_buffers")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)

# torch 2.13, _dynamo/variables/builder.py: Dynamo marks the parameters that it has traced; the siblings' not yet.
_WRITTEN_BY_DYNAMO = "_dynamo_static_input_type"


def tensor_meta(t: torch.Tensor) -> tuple[Any, ...]:
    """Everything about a parameter that may steer a trace: type, dtype, shape, strides and offset in elements, ..."""
    strided = t.layout == torch.strided
    return (
        type(t),
        t.dtype,
        tuple(t.shape),
        tuple(t.stride()) if strided else None,
        t.storage_offset() if strided else 0,
        t.device,
        t.layout,
        t.requires_grad,
        t.is_conj(),
        t.is_neg(),
    )


def compare(a: torch.nn.Module, b: torch.nn.Module) -> Comparison:
    """What corresponds and what differs between `a` and `b`.  Raises `Unlike` when their structure differs: classes,
    attribute names, submodules, parameters, metadata of tensors, hooks, or which of their objects are one object."""
    walk = _Walk()
    if a is not b and not walk.same(a, b, ""):
        raise Unlike("different classes")
    return walk.out


class _Walk:
    def __init__(self) -> None:
        self.out = Comparison()
        self.shared: dict[int, Any] = {}

    def corresponds(self, x: Any, y: Any, path: str) -> bool:
        """Record that `x` corresponds to `y`; True when that was known.  Raises `Unlike` unless it is one to one:
        where two attributes hold one object on one side and two on the other, `is` and in-place ops tell them apart."""
        known = self.out.pairs.get(id(x))
        if known is not None or id(y) in self.out.rights:
            if known != id(y) or self.out.rights[id(y)] != id(x):
                raise Unlike(f"{path}: an object used twice in one layer but not in the other")
            return True
        if id(x) in self.shared or id(y) in self.shared:
            raise Unlike(f"{path}: an object that both layers use, elsewhere one of their own")
        self.out.pairs[id(x)] = id(y)
        self.out.rights[id(y)] = id(x)
        self.out.keep.append((x, y))
        return False

    def member(self, owner: Any, key: Any, path: str, x: Any, y: Any) -> None:
        if not self.same(x, y, path):
            self.out.keep.append(owner)
            self.out.differences.append(Difference(owner, key, path, x, y))

    def attributes(self, x: Any, y: Any, path: str) -> None:
        self.corresponds(x.__dict__, y.__dict__, path)
        left, right = ({k: v for k, v in o.__dict__.items() if k != _WRITTEN_BY_DYNAMO} for o in (x, y))
        if left.keys() != right.keys():
            raise Unlike(f"{path or 'the layer'}: only one side has {sorted(map(str, left.keys() ^ right.keys()))}")
        module = isinstance(x, torch.nn.Module)
        for key, value in left.items():
            other = right[key]
            if module and key in _HOOKS:
                if value or other:
                    raise Unlike(f"{path}.{key}: hooks")
            elif module and key in _STRUCTURE:
                self.structure(value, other, f"{path}.{key}")
            else:
                self.member(x, key, f"{path}.{key}", value, other)

    def structure(self, x: dict[str, Any], y: dict[str, Any], path: str) -> None:
        if list(x) != list(y):
            raise Unlike(f"{path}: {sorted(set(x) ^ set(y)) or 'another order'}")
        if x is not y:
            self.corresponds(x, y, path)
        for key, value in x.items():
            here = f"{path}[{key!r}]"
            if type(value) is not type(y[key]):
                raise Unlike(f"{here}: {type(value).__name__} / {type(y[key]).__name__}")
            self.member(x, key, here, value, y[key])

    def same(self, x: Any, y: Any, path: str) -> bool:
        """False: a plain difference at this very place.  Deeper ones are recorded by `member`."""
        if x is y:
            if not isinstance(x, _IMMUTABLE) and type(x) is not tuple:
                if id(x) in self.out.pairs or id(x) in self.out.rights:
                    raise Unlike(f"{path}: an object that both layers use, elsewhere one of their own")
                self.shared[id(x)] = x
            return True
        if type(x) is not type(y):
            return False
        if isinstance(x, _ATOMS):
            return bool(x == y or (x != x and y != y))
        if isinstance(x, torch.Tensor):
            self.tensor(x, y, path)
            return True
        if isinstance(x, (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType)):
            return False
        if isinstance(x, types.MethodType):  # made anew by each access: has no identity to keep
            return x.__func__ is y.__func__ and self.same(x.__self__, y.__self__, f"{path}.__self__")
        if isinstance(x, (set, frozenset)):
            return bool(x == y)
        if isinstance(x, dict) and list(x) != list(y):
            return False
        if isinstance(x, (list, tuple)) and len(x) != len(y):
            return False
        if isinstance(x, types.FunctionType) and (x.__code__ is not y.__code__ or x.__globals__ is not y.__globals__):
            return False
        # Equal tuples may or may not be one object, as the interpreter likes: theirs is no identity to keep.
        if type(x) is not tuple and self.corresponds(x, y, path):
            return True
        return self.contents(x, y, path)

    def tensor(self, x: torch.Tensor, y: torch.Tensor, path: str) -> None:
        if is_traceable_wrapper_subclass(x):
            raise Unlike(f"{path}: a tensor subclass that wraps others, whose reads Dynamo does not record")
        if (left := tensor_meta(x)) != (right := tensor_meta(y)):
            differ = next((p, q) for p, q in zip(left, right, strict=True) if p != q)
            raise Unlike(f"{path}: {differ[0]} / {differ[1]}")
        if not self.corresponds(x, y, path):
            self.out.tensors[id(x)] = (path, y)
            if getattr(x, "__dict__", None) or getattr(y, "__dict__", None):
                self.attributes(x, y, path)

    def contents(self, x: Any, y: Any, path: str) -> bool:
        if isinstance(x, dict):
            for key in x:
                self.member(x, key, f"{path}[{key!r}]", x[key], y[key])
        elif isinstance(x, (list, tuple)):
            for i, (p, q) in enumerate(zip(x, y, strict=True)):
                self.member(x, i, f"{path}[{i}]", p, q)
        elif isinstance(x, types.FunctionType):
            return self.function(x, y, path)
        elif isinstance(x, functools.partial):
            for name in ("func", "args", "keywords"):
                self.member(x, name, f"{path}.{name}", getattr(x, name), getattr(y, name))
        elif not hasattr(x, "__dict__") and not any("__slots__" in c.__dict__ for c in type(x).__mro__):
            try:
                return bool(x == y)
            except Exception:  # `==` of somebody's class: whatever it raises, it does not say "equal"
                return False
        self.slots(x, y, path)
        if hasattr(x, "__dict__") and not isinstance(x, functools.partial):
            self.attributes(x, y, path)
        return True

    def slots(self, x: Any, y: Any, path: str) -> None:
        for cls in type(x).__mro__:
            names = cls.__dict__.get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if name not in ("__dict__", "__weakref__"):
                    self.member(x, name, f"{path}.{name}", getattr(x, name, None), getattr(y, name, None))

    def function(self, x: types.FunctionType, y: types.FunctionType, path: str) -> bool:
        for name in ("__defaults__", "__kwdefaults__"):
            self.member(x, name, f"{path}.{name}", getattr(x, name), getattr(y, name))
        for i, (p, q) in enumerate(zip(x.__closure__ or (), y.__closure__ or (), strict=True)):
            here = f"{path}.__closure__[{i}]"
            if p is not q:
                self.corresponds(p, q, here)
            try:
                left, right = p.cell_contents, q.cell_contents
            except ValueError:  # an empty cell
                return False
            self.member(p, "cell_contents", f"{here}.cell_contents", left, right)
        self.attributes(x, y, path)
        return True
