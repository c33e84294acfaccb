"""Strict comparison: by exact type, by bits, in order, and everything that a type can hold."""

from __future__ import annotations

import collections
import copy
import itertools
import struct
from typing import Any

import numpy as np
import pytest
from torch import nn, zeros

from tests.fuzz.kit import Box, Point
from tests.fuzz.values import KINDS, Kind
from vllm_compile_ext.trace.same_kind import Different, compare
from vllm_compile_ext.trace.values import ALL, Accessed


def nan(payload: int) -> float:
    return float(struct.unpack("d", struct.pack("Q", 0x7FF8000000000000 | payload))[0])


class Layer(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def accessed(**read: type) -> Accessed:
    made = Accessed()
    made.add(Layer, "value")
    for name, kind in read.items():
        made.add(kind, name)
    return made


def everything() -> Accessed:
    made = accessed()
    made.add(None, ALL)
    made.said |= {"by", "extra"}  # of classes
    return made


def differ(one: Any, other: Any, seen: Accessed | None = None) -> str:
    try:
        compare(Layer(one), Layer(other), seen or accessed())
    except Different as why:
        return str(why)
    return ""


UNKNOWN = {"iterator", "module"}  # types of which each object equals only itself
OTHER_GLOBALS = {"code of one name"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_variants_of_a_kind_differ_and_equal_values_do_not(kind: Kind) -> None:
    for one, other in itertools.combinations(range(kind.variants), 2):
        why = differ(kind.make(one), kind.make(other), everything())
        assert (why == "") == kind.tensors, why
    if kind.name not in UNKNOWN | OTHER_GLOBALS:
        assert all(differ(kind.make(k), kind.make(k), everything()) == "" for k in range(kind.variants))


PAIRS: dict[str, tuple[Any, Any]] = {
    "payload of a nan": (nan(1), nan(2)),
    "parts of a complex": (complex(0.0, 0.0), complex(0.0, -0.0)),
    "slice": (slice(1), slice(2)),
    "length of a deque": (collections.deque([1], 1), collections.deque([1], 2)),
    "factory": (collections.defaultdict(int), collections.defaultdict(list)),
    "type of a numpy scalar": (np.float32(1), np.float64(1)),
    "numpy array": (np.array([0.0]), np.array([-0.0])),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_differs(pair: str) -> None:
    assert differ(*PAIRS[pair]).startswith(".value")
    for value in PAIRS[pair]:
        assert differ(value, copy.deepcopy(value)) == ""


def test_the_same_object_of_an_unknown_type_is_equal() -> None:
    unknown: Any = memoryview(b"a")
    assert differ(unknown, unknown) == ""
    assert "a type that is not known" in differ(unknown, memoryview(b"a"))


def test_an_attribute_that_nobody_accessed_may_differ() -> None:
    one, other = Box(a=1, b=1), Box(a=1, b=2)
    assert differ(one, other, accessed(a=Box)) == ""
    assert differ(one, other, accessed(a=Box, b=Box)) == ".value.b: 1 / 2"
    assert differ(Point(1, 1), Point(1, 2), accessed(by=Point)) == ""


class Configuration(Box):
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
    seen.add(Box, whole)
    assert differ(Box(a=1), Box(a=2), seen) == ".value.a: 1 / 2"


def test_a_string_in_the_code_may_be_a_name() -> None:
    seen = accessed()
    seen.add_code(compile("f('a')", "", "exec"))
    assert differ(Box(a=1), Box(a=2), seen) == ".value.a: 1 / 2"


def test_objects_correspond_one_to_one() -> None:
    shared: list[int] = []
    assert "used twice" in differ([shared, shared], [[], []])
    assert "used twice" in differ([[], []], [shared, shared])
    assert differ([shared, shared], [shared, shared]) == ""


def test_tensors_correspond_with_what_they_share() -> None:
    whole, other = zeros(4), zeros(4)
    assert "share memory" in differ([whole[:2], whole[2:]], [other[:2], zeros(4)[2:]])
    assert differ([whole[:2], whole[2:]], [other[:2], other[2:]]) == ""


def test_only_names_that_went_into_an_input_may_differ() -> None:
    one, other = Layer("layers.0"), Layer("layers.1")
    same = compare(one, other, accessed(), {(id(one), ".value")})
    assert same.names == {"layers.0": "layers.1"}
    with pytest.raises(Different, match=r"\.value: 'layers\.0' / 'layers\.1'"):
        compare(one, other, accessed())
