"""Are two layers of the same kind?  Whatever a trace could see of one is the same in the other, but for their tensors,
their names, and attributes that no code has named.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Collection, Iterable
from typing import Any

import torch

from vllm_compile_ext.trace.values import HEAP_TYPE, Accessed, is_atom, look


class Different(Exception):  # noqa: N818 - an answer, not an error
    """The two are not of the same kind; the message names the attribute and both values."""


# Equal ones may or may not be one object, as the interpreter likes; each access makes a method anew.
_NO_IDENTITY = (tuple, frozenset, str, bytes, types.MethodType, torch.Size, range)


def compare(one: Any, other: Any, accessed: Accessed, lifted: Collection[tuple[int, str]] = ()) -> Same:
    """What corresponds in two layers.  Raises `Different` where they are not proven to be of the same kind.

    accessed: what the trace has accessed.  lifted: (id of an object, step) of strings of `one` that the trace used for
    nothing but to make a graph input.
    """
    same = Same(accessed, lifted)
    same.compare(one, other, "")
    return same


class Same:
    """What corresponds in two layers of the same kind.

    own: id of each object that only the first one has -> its counterpart; counterparts: the same for the second one.
    tensors: id of a tensor among the first one's own -> (access path, the counterpart).  names: what the layer is
    called -> what the other one is called.  shared: the objects that both have.
    """

    def __init__(self, accessed: Accessed, lifted: Collection[tuple[int, str]]) -> None:
        self.own: dict[int, Any] = {}
        self.counterparts: dict[int, Any] = {}
        self.tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self.names: dict[str, str] = {}
        self.shared: list[Any] = []
        self._accessed = accessed
        self._lifted = lifted
        self._keep: list[Any] = []  # whose ids are known
        self._storages: dict[int, int] = {}

    def holds(self, value: Any) -> bool:
        """Whether `value` belongs to one of the two and not to the other."""
        return id(value) in self.own or id(value) in self.counterparts

    def compare(self, x: Any, y: Any, path: str) -> None:
        """Note that `x` corresponds to `y`, and their parts to each other; `path` leads to them."""
        if x is y:
            if not is_atom(x):
                self.shared.append(x)
            return
        if type(x) is not type(y) or isinstance(x, type | types.ModuleType):
            raise Different(f"{path}: {_text(x)} / {_text(y)}")
        left, right = look(x, self._accessed), look(y, self._accessed)
        if left is None or right is None:
            raise Different(f"{path}: two objects of a type that is not known, {type(x).__qualname__}")
        if left.head != right.head:
            raise Different(f"{path}: {_heads(x, y, left.head, right.head)}")
        if is_atom(x) or (type(x) not in _NO_IDENTITY and self._known(x, y, path)):
            return
        if isinstance(x, torch.Tensor):
            here, there = storage_of(x), storage_of(y)
            if self._storages.setdefault(here, there) != there or self._storages.setdefault(~there, here) != here:
                raise Different(f"{path}: tensors that share memory in one layer but not in the other")
            self.tensors[id(x)] = (path, y)
        if type(x) is types.FunctionType and x.__globals__ is not y.__globals__:
            raise Different(f"{path}: functions of two modules")
        if [step for step, _ in left.parts] != [step for step, _ in right.parts]:
            only = {p[0] for p in left.parts} ^ {q[0] for q in right.parts}
            raise Different(f"{path}: only one has {', '.join(sorted(only))}" if only else f"{path}: in another order")
        for (step, p), (_, q) in zip(left.parts, right.parts, strict=True):
            if p is not q and type(p) is str is type(q) and (id(x), step) in self._lifted:
                if self.names.setdefault(p, q) != q:
                    raise Different(f"{path}{step}: one name stands for two")
            else:
                self.compare(p, q, path + step)

    def _known(self, x: Any, y: Any, path: str) -> bool:
        """Note that `x` corresponds to `y`; True when that was known.

        One to one: where one layer has an object twice and the other has two, `is` and changes in place tell.
        """
        if id(x) in self.own or id(y) in self.counterparts:
            if self.own.get(id(x)) is not y or self.counterparts.get(id(y)) is not x:
                raise Different(f"{path}: an object that is used twice in one layer but not in the other")
            return True
        self.own[id(x)], self.counterparts[id(y)] = y, x
        self._keep += (x, y)
        return False


def storage_of(tensor: torch.Tensor) -> int:
    """Which memory a tensor is in: equal numbers may overlap."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # no storage that could be asked for
        return id(tensor)


class Reach:
    """The objects that can be reached from some values by code that says certain names.

    tables: dictionaries that are not looked into, since whoever reads them is asked for the names that it used.
    """

    def __init__(self, accessed: Accessed, tables: Iterable[Any], values: Iterable[Any]) -> None:
        self.ids: set[int] = {id(t) for t in tables}
        self.tensors: dict[int, torch.Tensor] = {}
        self._keep: list[Any] = []
        todo = list(values)
        while todo:
            value = todo.pop()
            if is_atom(value) or id(value) in self.ids or isinstance(value, types.ModuleType):
                continue
            self.ids.add(id(value))
            self._keep.append(value)
            if isinstance(value, torch.Tensor):
                self.tensors[id(value)] = value
            seen = look(value, accessed)
            if seen is None:  # what C code holds
                todo += [v for v in gc.get_referents(value) if not isinstance(v, type | types.ModuleType)]
                continue
            todo += [part for _, part in seen.parts]
            if not isinstance(value, type) and type(value).__flags__ & HEAP_TYPE:
                todo.append(type(value))


def _heads(x: Any, y: Any, left: tuple[Any, ...], right: tuple[Any, ...]) -> str:
    if is_atom(x):
        return f"{_text(x)} / {_text(y)}"
    if isinstance(x, types.FunctionType):
        return f"functions with other code, {x.__qualname__} / {y.__qualname__}"
    p, q = next(((p, q) for p, q in zip(left, right, strict=False) if p != q), (left, right))
    return f"{type(x).__qualname__}, {p!r:.60} / {q!r:.60}"


def _text(value: Any) -> str:
    if is_atom(value):
        return repr(value)[:60]
    if isinstance(value, type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType):
        return f"{getattr(value, '__qualname__', value.__name__)}"
    return f"a {type(value).__qualname__}"
