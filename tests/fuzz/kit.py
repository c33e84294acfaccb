"""What the generated layers are made of: kinds of objects that hold a value, and functions that read one.

The code of a generated stack runs with these names as its globals; see `stacks.py`.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import itertools
import math
import operator
import types
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tests.unit.trace.models import Name, attn

__all__ = ["collections", "contextlib", "copy", "functools", "itertools", "math", "nn", "np", "operator", "weakref"]
__all__ += ["Name", "attn"]


class Scale(NamedTuple):
    by: float
    other: float = 1.0


Colour = enum.Enum("Colour", {"RED": 1, "GREEN": 2, "BLUE": 3}, module=__name__)
Level = enum.IntEnum("Level", {"LOW": 1, "MIDDLE": 2, "HIGH": 3}, module=__name__)
Mode = enum.StrEnum("Mode", {"FAST": "a", "SMALL": "bb", "EXACT": "ccc"}, module=__name__)
Flags = enum.Flag("Flags", {"A": 1, "B": 2, "C": 4}, module=__name__)

_dataclass = functools.partial(dataclasses.make_dataclass, namespace={"__module__": __name__})
_FIELDS: list[Any] = [("by", float), ("other", float, 1.0)]
Point: Any = _dataclass("Point", _FIELDS)
Frozen: Any = _dataclass("Frozen", _FIELDS, frozen=True)
SlotPoint: Any = _dataclass("SlotPoint", _FIELDS, slots=True)
# Equal to every other one, whatever `by` is.
Uncompared: Any = _dataclass("Uncompared", [("by", float, dataclasses.field(compare=False)), _FIELDS[1]])
NeverEqual: Any = _dataclass("NeverEqual", _FIELDS, eq=False)
Grown: Any = _dataclass("Grown", [("more", float, 0.0)], bases=(Point,))


class Box:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def get(self, *_: Any) -> Any:
        return self.by

    def scaled(self, k: float) -> Any:
        return self.by * k


class AlwaysEqual(Box):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 7


class Sized(Box):
    def __len__(self) -> int:
        return self.by

    def __bool__(self) -> bool:
        return self.by > 1

    def __contains__(self, value: Any) -> bool:
        return value == self.by

    def __getitem__(self, key: Any) -> Any:
        return self.by + key

    def __iter__(self) -> Any:
        return iter([self.by, 1])

    def __call__(self, y: Any = 0) -> Any:
        return self.by + 1

    def __add__(self, other: Any) -> Any:
        return self.by + other


class Slotted:
    __slots__ = ("__by", "open")

    def __init__(self, by: Any) -> None:
        self.__by = by
        self.open = by

    @property
    def by(self) -> Any:
        return self.__by


class Private:
    def __init__(self, by: Any) -> None:
        self.__by = by
        self._table = {"by": by}

    @property
    def by(self) -> Any:
        return self.__by

    @property
    def twice(self) -> Any:
        return self._table["by"] * 2


class Lazy:
    def __init__(self, **table: Any) -> None:
        self.__dict__["table"] = table

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["table"][name]
        except KeyError:
            raise AttributeError(name) from None


class Reads:
    """A data descriptor."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        return instance._by

    def __set__(self, instance: Any, value: Any) -> None:
        instance._by = value


class Derived:
    """A descriptor without `__set__`."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        return instance._by + 1


class Described:
    by = Reads()
    more = Derived()

    def __init__(self, by: Any) -> None:
        self.by = by


class Parent:
    by = 1.0

    def read(self) -> Any:
        return self.by

    @classmethod
    def of_class(cls) -> Any:
        return cls.by


CLASSES: dict[str, type] = {}  # of a stack


def subclass(by: Any) -> type:
    """A class with this attribute, the same for numbers of the same type and digits."""
    made = type("Sub", (Parent,), {"by": by})
    return CLASSES.setdefault(f"{type(by)} {by!r}", made) if isinstance(by, int | float) else made


def _own(name: str, base: type) -> Any:
    """A class of Python, whose objects may have attributes."""
    return type(name, (base,), {"__module__": __name__})


MyInt, MyFloat, MyStr = _own("MyInt", int), _own("MyFloat", float), _own("MyStr", str)
MyTuple, MyList, MySet = _own("MyTuple", tuple), _own("MyList", list), _own("MySet", set)
MyDict, MyOrdered = _own("MyDict", dict), _own("MyOrdered", collections.OrderedDict)


class Upper(dict):
    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) + 1

    def __missing__(self, key: Any) -> Any:
        return 1


def extra(value: Any, by: Any) -> Any:
    value.extra = by
    return value


def default(k: Any) -> Any:
    return lambda y=0, k=k: k


def keyword_default(k: Any) -> Any:
    return lambda y=0, *, k=k: k


def closure(k: Any) -> Any:
    return lambda y=0: k


def deep_closure(k: Any) -> Any:
    inner = closure(k)
    return lambda y=0: inner(y)


def list_closure(k: Any) -> Any:
    cell = [k]
    return lambda y=0: cell[0]


def code_0(y: Any = 0) -> Any:
    return 1.0


def code_1(y: Any = 0) -> Any:
    return 2.0


def code_2(y: Any = 0) -> Any:
    return 4.0


CODES = (code_0, code_1, code_2)


def attributed(k: Any) -> Any:
    def f(y: Any = 0) -> Any:
        return 1

    f.by = k
    return f


def wrapped(k: Any) -> Any:
    inner = default(k)

    @functools.wraps(inner)
    def f(*args: Any) -> Any:
        return inner(*args)

    return f


def give(k: Any, y: Any = 0) -> Any:
    return k


def give_keyword(y: Any = 0, *, k: Any = 1) -> Any:
    return k


def code_of(text: str) -> Any:
    """A function with the same name, and other code."""
    space: dict[str, Any] = {}
    exec(f"def made(y=0):\n    return {text}\n", space)
    return space["made"]


# Functions that read.


def matched(v: Any) -> Any:
    match v:
        case 0 | 0.5 | "n0":
            return 1
        case int() | float() if v > 2:
            return 2
        case str() if v.endswith("3"):
            return 3
        case None:
            return 4
        case _:
            return 5


def matched_sequence(v: Any) -> Any:
    match v:
        case [1, a]:
            return a
        case [1, a, *rest]:
            return a + len(rest)
        case _:
            return 2


def matched_map(v: Any) -> Any:
    match v:
        case {"k": k}:
            return k
        case _:
            return 2


def matched_point(v: Any) -> Any:
    match v:
        case Point(by=0.0) | Frozen(by=0.0):
            return 1
        case Point(by=b) | Frozen(by=b):
            return b + 2
        case _:
            return 9


def matched_colour(v: Any) -> Any:
    match v:
        case Colour.RED:
            return 1
        case Colour.GREEN:
            return 2
    return 4


def tried_key(v: Any, key: Any = "k3") -> Any:
    try:
        return v[key]
    except KeyError:
        return 3


def tried_attribute(v: Any, name: str = "by3") -> Any:
    try:
        return getattr(v, name)
    except AttributeError:
        return 3


def tried_index(v: Any, index: int = 3) -> Any:
    try:
        return v[index]
    except IndexError:
        return 3


def unpacked(v: Any) -> Any:
    first, *rest = v
    return first + 2 * len(rest)


def last(v: Any) -> Any:
    *_, end = v
    return end


def looped(v: Any) -> Any:
    total = 0
    for item in v:
        total = 2 * total + item
    return total


def counted(v: Any) -> Any:
    n = 0
    while n < v:
        n += 1
    return n


def spread(a: Any, b: Any = 2, *more: Any, k: Any = 1, **rest: Any) -> Any:
    return a + 2 * b + len(more) + k + len(rest)


def named(k: Any = 1, **rest: Any) -> Any:
    return k + len(rest)


def vary(v: Any) -> Any:
    """Depends on the type alone."""
    if isinstance(v, bool):
        return 1
    if isinstance(v, int):
        return 2
    if isinstance(v, float):
        return 3
    return 4


def text(v: Any) -> str:
    return f"{v}"


def shown(v: Any) -> str:
    return f"<{v!r:>4}>"


def first_of(v: Any) -> Any:
    return next(iter(v))


# State around a call.


class Doubles(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.sin else result


class Current:
    value = 1.0
    stack: list[Any] = []  # noqa: RUF012 - shared on purpose


@contextlib.contextmanager
def using(value: Any) -> Any:
    before, Current.value = Current.value, value
    try:
        yield
    finally:
        Current.value = before


class Using:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __enter__(self) -> None:
        self.before, Current.value = Current.value, self.value

    def __exit__(self, *_: Any) -> None:
        Current.value = self.before


class TripleLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Probe(nn.Module):
    """A module that reads something of a layer before the layer does."""

    def forward(self, x: torch.Tensor, value: Any) -> torch.Tensor:
        return x


SHARED = types.SimpleNamespace(by=2.0)
