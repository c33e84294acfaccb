"""Strict comparison: by exact type, by bits, in order, and everything that a type can hold."""

from __future__ import annotations

import collections
import enum
import functools
import struct
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from vllm_compile_ext.trace.same_kind import Different, compare
from vllm_compile_ext.trace.values import ALL, Accessed


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: Any


class Number(float):
    pass


class Table(dict[str, Any]):
    pass


class Slotted:
    __slots__ = ("__hidden", "seen")

    def __init__(self, value: Any) -> None:
        self.__hidden = value


@dataclass(frozen=True)
class Frozen:
    x: Any


@dataclass
class Fields:
    x: Any
    y: Any = 1


class Plain:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def number(value: float, extra: Any) -> Number:
    made = Number(value)
    made.extra = extra  # type: ignore[attr-defined]
    return made


def table(extra: Any) -> Table:
    made = Table(a=1)
    made.extra = extra  # type: ignore[attr-defined]
    return made


def closure(value: Any) -> Callable[[], Any]:
    return lambda: value


def nan(payload: int) -> float:
    return float(struct.unpack("d", struct.pack("Q", 0x7FF8000000000000 | payload))[0])


class Box(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def accessed(**read: type) -> Accessed:
    made = Accessed()
    made.add(Box, "value")
    for name, kind in read.items():
        made.add(kind, name)
    return made


def differ(one: Any, other: Any, seen: Accessed | None = None) -> str:
    try:
        compare(Box(one), Box(other), seen or accessed())
    except Different as why:
        return str(why)
    return ""


PAIRS: dict[str, tuple[Any, Any]] = {
    "sign of zero": (0.0, -0.0),
    "int and float": (1, 1.0),
    "int and bool": (1, True),
    "payload of a nan": (nan(1), nan(2)),
    "parts of a complex": (complex(0.0, 0.0), complex(0.0, -0.0)),
    "str and bytes": ("a", b"a"),
    "dtype": (torch.float32, torch.float64),
    "device": (torch.device("cpu"), torch.device("meta")),
    "member of an enum": (Level.LOW, Level.HIGH),
    "range of the same items": (range(0, 3, 2), range(0, 4, 2)),
    "slice": (slice(1), slice(2)),
    "item of a tuple": ((1, (2,)), (1, (3,))),
    "list and tuple": ([1], (1,)),
    "order of a set": ({8, 0}, {0, 8}),
    "length of a deque": (collections.deque([1], 1), collections.deque([1], 2)),
    "order of a dict": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "type of a key": ({1: 1}, {1.0: 1}),
    "nested": ({"a": [{"b": (1.0,)}]}, {"a": [{"b": (2.0,)}]}),
    "factory": (collections.defaultdict(int), collections.defaultdict(list)),
    "mapping proxy": (types.MappingProxyType({"a": 1}), types.MappingProxyType({"a": 1.0})),
    "field of a named tuple": (Point(1), Point(2)),
    "attribute of a float": (number(1.0, 1), number(1.0, 2)),
    "attribute of a dict": (table(1), table(2)),
    "mangled slot": (Slotted(1), Slotted(2)),
    "field of a frozen dataclass": (Frozen(1), Frozen(2)),
    "field of a namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "closure": (closure(1), closure(2)),
    "default": (lambda x=1: x, lambda x=2: x),
    "code": (lambda x: x, lambda x: x + 1),
    "argument of a partial": (functools.partial(max, 1), functools.partial(max, 2)),
    "keyword of a partial": (functools.partial(print, end=""), functools.partial(print, end="\n")),
    "bound to another object": (Frozen(1).__repr__, Frozen(2).__repr__),
    "numpy scalar": (np.float32(1), np.float32(2)),
    "type of a numpy scalar": (np.float32(1), np.float64(1)),
    "numpy array": (np.array([0.0]), np.array([-0.0])),
    "class": (Level, Point),
    "shape of a tensor": (torch.zeros(2), torch.zeros(3)),
    "strides of a tensor": (torch.zeros(2, 2), torch.zeros(2, 2).t()),
    "gradient of a tensor": (torch.zeros(2), torch.zeros(2, requires_grad=True)),
    "a type that is not known": (memoryview(b"a"), memoryview(b"a")),
    "None and a tensor": (None, torch.zeros(1)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_differs(pair: str) -> None:
    assert differ(*PAIRS[pair]).startswith(".value")


@pytest.mark.parametrize("pair", sorted(set(PAIRS) - {"class", "a type that is not known", "strides of a tensor"}))
def test_equal_ones_are_the_same(pair: str) -> None:
    import copy

    for value in PAIRS[pair]:
        if not isinstance(value, types.MappingProxyType):
            assert differ(value, copy.deepcopy(value)) == ""


def test_the_same_object_of_an_unknown_type_is_equal() -> None:
    unknown = memoryview(b"a")
    assert differ(unknown, unknown) == ""


def test_an_attribute_that_nobody_accessed_may_differ() -> None:
    one, other = Plain(a=1, b=1), Plain(a=1, b=2)
    assert differ(one, other, accessed(a=Plain)) == ""
    assert differ(one, other, accessed(a=Plain, b=Plain)) == ".value.b: 1 / 2"
    assert differ(Fields(1, 1), Fields(1, 2), accessed(x=Fields)) == ""


class Configuration(Plain):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


def test_where_a_configuration_came_from_counts_only_where_it_is_read() -> None:
    one, other = Configuration(a=1, _name_or_path="x"), Configuration(a=1, _name_or_path="y")
    assert differ(one, other, accessed(a=Configuration)) == ""
    assert differ(one, Configuration(a=2, _name_or_path="y"), accessed()) == ".value.a: 1 / 2"
    for read in ("_name_or_path", "name_or_path", ALL):
        seen = accessed()
        seen.add(Configuration, read)
        assert differ(one, other, seen) == ".value._name_or_path: 'x' / 'y'"


@pytest.mark.parametrize("whole", [ALL, "__reduce_ex__", "__getstate__"])
def test_who_reads_all_attributes_reads_each(whole: str) -> None:
    seen = accessed()
    seen.add(Plain, whole)
    assert differ(Plain(a=1), Plain(a=2), seen) == ".value.a: 1 / 2"


def test_a_string_in_the_code_may_be_a_name() -> None:
    seen = accessed()
    seen.add_code(compile("f('a')", "", "exec"))
    assert differ(Plain(a=1), Plain(a=2), seen) == ".value.a: 1 / 2"


def test_objects_correspond_one_to_one() -> None:
    shared: list[int] = []
    assert "used twice" in differ([shared, shared], [[], []])
    assert "used twice" in differ([[], []], [shared, shared])
    assert differ([shared, shared], [shared, shared]) == ""


def test_tensors_correspond_with_what_they_share() -> None:
    whole, other = torch.zeros(4), torch.zeros(4)
    assert "share memory" in differ([whole[:2], whole[2:]], [other[:2], torch.zeros(4)[2:]])
    assert differ([whole[:2], whole[2:]], [other[:2], other[2:]]) == ""


def test_only_names_that_went_into_an_input_may_differ() -> None:
    one, other = Box("layers.0"), Box("layers.1")
    same = compare(one, other, accessed(), {(id(one), ".value")})
    assert same.names == {"layers.0": "layers.1"}
    with pytest.raises(Different, match=r"\.value: 'layers\.0' / 'layers\.1'"):
        compare(one, other, accessed())
