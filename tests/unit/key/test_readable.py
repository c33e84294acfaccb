"""Values as text: equal exactly when the values are, and one text for each leaf."""

from __future__ import annotations

import json
from enum import Enum, IntEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_compile_ext.key import readable

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
NAMES = st.text("abcd", min_size=1, max_size=2)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


class Color(Enum):
    RED = 0
    BLUE = (2, 1)


class Mode(IntEnum):
    FULL = 3


def flat(value: Any) -> dict[str, str]:
    return readable.flat({"a": value})


@given(VALUES, VALUES)
def test_texts_are_equal_exactly_when_values_are(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (flat(one) == flat(other)) == same


def test_none_is_a_setting_that_is_not_there_and_a_key_that_is() -> None:
    assert flat(None) == {}
    assert flat({"b": None}) == {"a.b": "None"}


@pytest.mark.parametrize("value", ["3", "1e5", "True", "None", "", "[1]", "{}", "('a', 1)", "nan", "'x'"])
def test_a_string_is_not_taken_for_another_value(value: str) -> None:
    assert readable.text(value) in (repr(value), readable.hidden("", repr(value)))
    assert readable.text("True") == "'True'"
    assert readable.text("auto") == "auto"


def test_dictionaries_are_split_also_as_vllm_hashes_them() -> None:
    assert flat({"b": {"c": 1, "d": [2, "mp"]}}) == {"a.b.c": "1", "a.b.d": "[2, 'mp']"}
    assert flat((("b", 1), ("c", (("d", 2),)))) == {"a.b": "1", "a.c.d": "2"}
    assert flat(("vllm.config.parallel.EPLBConfig", (("policy", "default"),))) == {"a.policy": "default"}
    assert flat((1, 2)) == {"a": "[1, 2]"}
    assert flat((("mp", 1), ("mp", 2))) == {"a": "[['mp', 1], ['mp', 2]]"}, "no dictionary: one key twice"


def test_members_of_enums_have_names() -> None:
    kind = f"{Color.__module__}.{Color.__qualname__}"
    assert readable.text(Mode.FULL) == "FULL"
    assert flat((kind, 0)) == {"a": "RED"}
    assert flat((kind, (2, 1))) == {"a": "BLUE"}
    assert flat((kind, 7)) == {"a": readable.hidden("a", f"['{kind}', 7]")}


def test_long_texts_keep_their_beginning_and_a_digest() -> None:
    long = [readable.text([*range(500), end]) for end in (1, 2)]
    assert long[0] != long[1]
    assert all(t.startswith("[0, 1,") and len(t) < readable.LIMIT for t in long)
    labels = {str(n): f"label {n}" for n in range(readable.MANY + 1)}
    assert list(flat({"labels": labels})) == ["a.labels"]


def test_objects_have_no_addresses() -> None:
    class Pass:
        def uuid(self) -> str:
            return "1234"

    assert readable.whole(Pass()).endswith("Pass 1234>")
    assert readable.whole(object()) == "<object object>"
    assert readable.text(object()) == readable.text(object())
    assert readable.text({int, str}) == "{<builtins.int>, <builtins.str>}"


@settings(deadline=None)
@given(st.text(), st.text(), st.sampled_from(["token", "dtype", "a"]))
def test_hidden_values_differ_where_values_do_and_say_nothing(one: str, other: str, name: str) -> None:
    texts = [readable.text({"x": value}, name) for value in (one + "/s3cret", other + "/s3cret")]
    assert all(text.startswith("***") and len(text) == 35 for text in texts)
    assert (texts[0] == texts[1]) == (one == other)


def test_equal_values_of_two_names_do_not_look_equal() -> None:
    assert readable.text("s3cret", "a") != readable.text("s3cret", "b")


def test_a_key_that_is_no_name_is_hidden() -> None:
    (name,) = flat({"postgres://u:s3cret@h": 1})
    assert name.startswith("a.***")
    assert flat({"cpp.threads": 1}) == {"a.cpp.threads": "1"}
