"""One key for equal factors, another for any change, and a miss that says which change it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compile_ext.key.miss import Change, closest, difference, summary
from vllm_compile_ext.store.store import Manifest, key_of

tables = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=4)


def entry(name: str, created: float = 0.0, **factors: str) -> Manifest:
    return Manifest(
        kind="program",
        key=key_of(factors),
        shard="rank0",
        model=name,
        created=created,
        platform="",
        factors=factors,
        members={},
    )


@given(tables, tables)
def test_two_tables_have_one_key_only_if_they_are_equal(one: dict[str, str], other: dict[str, str]) -> None:
    assert (key_of(one) == key_of(other)) == (one == other)
    assert (difference(one, other) == []) == (one == other)


def test_the_key_does_not_depend_on_the_order() -> None:
    assert key_of({"a": "1", "b": "2"}) == key_of({"b": "2", "a": "1"})


def test_the_key_is_the_same_in_every_process_and_version() -> None:
    assert key_of({"b": "2", "a": "1"}) == "452606680be653cc2428e8347afbc8b60a643f584b8091ed0b5e10fc753b4d05"


def test_a_separator_in_a_value_does_not_make_two_tables_one() -> None:
    assert key_of({"a": '1","b":"2'}) != key_of({"a": "1", "b": "2"})


def test_difference_names_what_changed_came_and_went() -> None:
    old, new = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}
    assert difference(old, new) == [Change("b", "2", "4"), Change("d", None, "5"), Change("c", "3", None)]


def test_the_closest_has_the_fewest_changes() -> None:
    far, near = entry("far", torch="2.13.1", vllm="0.1", cpu="a"), entry("near", torch="2.13.0", vllm="0.9", cpu="b")
    assert closest({"torch": "2.13.1", "vllm": "0.9", "cpu": "b"}, [far, near]) == (
        near,
        [Change("torch", "2.13.0", "2.13.1")],
    )


def test_among_equals_the_closest_has_the_most_similar_values_then_is_the_newest() -> None:
    old, new, other = (
        entry("old", 1.0, torch="2.13.0"),
        entry("new", 2.0, torch="2.13.0"),
        entry("other", 3.0, torch="1.0"),
    )
    for entries in ([old, new, other], [other, new, old]):
        found = closest({"torch": "2.13.1"}, entries)
        assert found is not None
        assert found[0] is new


def test_nothing_is_closest_in_an_empty_store() -> None:
    assert closest({"torch": "2.13.1"}, []) is None
    assert summary(None) == "cache miss: nothing is stored yet"


def test_the_line_says_what_changed() -> None:
    assert summary([Change("torch", "2.13.0", "2.13.1")]) == "cache miss: torch 2.13.0 -> 2.13.1"
    assert summary([Change("a", None, "1"), Change("b", "2", None)]) == "cache miss: a unset -> 1, b 2 -> unset"
    assert "cannot be used" in summary([])


def test_what_a_terminal_would_act_on_is_written_out() -> None:
    """A config.json may hold anything."""
    line = summary([Change("config.a\n", "\x1b[31mred", "\nINFO all is well\r\u202e\x9b\u200b")])
    assert line == r"cache miss: config.a\n \x1b[31mred -> \nINFO all is well\r\u202e\x9b\u200b"


def test_the_line_stays_short_and_counts_the_rest() -> None:
    line = summary([Change(f"factor{index}", "a", "b") for index in range(9)])
    assert line.endswith("factor2 a -> b and 6 more")


@pytest.mark.parametrize("place", [0, 500, 999])
def test_of_long_values_the_line_shows_where_they_differ(place: int) -> None:
    old = "x" * 1000
    new = old[:place] + "DIFFERENT" + old[place:]
    line = summary([Change("config", old, new)])
    assert "DIFFERENT" in line
    assert len(line) < 150


def test_of_hidden_values_a_line_says_only_that_they_differ() -> None:
    assert str(Change("a.b", "***12", "***34")) == "a.b has another value"
    assert str(Change("a.b:", None, "***34")) == "a.b: unset -> ***"
    assert str(Change("a.b", "auto", "***34")) == "a.b auto -> ***"
