"""One key for equal factors, another for any change, and a miss that says which change it was and is kept."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compile_ext.key import misses
from vllm_compile_ext.key.misses import Change, Miss, closest, difference, summary
from vllm_compile_ext.store.files import Tree
from vllm_compile_ext.store.store import Manifest, key_of

tables = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=4)
OLD = {"torch": "2.13.0"}


def entry(name: str, created: float = 0.0, **factors: str) -> Manifest:
    about: dict[str, Any] = {"kind": "program", "shard": "rank0", "platform": "", "members": {}}
    return Manifest(key=key_of(factors), model=name, created=created, factors=factors, **about)


@given(tables, tables)
def test_two_tables_have_one_key_only_if_they_are_equal(one: dict[str, str], other: dict[str, str]) -> None:
    assert (key_of(one) == key_of(other)) == (one == other)
    names = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert {change.name: change[1:] for change in difference(one, other)} == {
        name: (one.get(name), other.get(name)) for name in names
    }


def test_the_key_is_the_same_in_every_order_process_and_version() -> None:
    key = "452606680be653cc2428e8347afbc8b60a643f584b8091ed0b5e10fc753b4d05"
    assert key_of({"b": "2", "a": "1"}) == key_of({"a": "1", "b": "2"}) == key
    assert key_of({"a": '1","b":"2'}) != key


def test_the_closest_has_the_fewest_changes_then_the_most_similar_values_then_is_the_newest() -> None:
    far, near = entry("far", torch="2.13.1", vllm="0.1", cpu="a"), entry("near", torch="2.13.0", vllm="0.9", cpu="b")
    found = closest({"torch": "2.13.1", "vllm": "0.9", "cpu": "b"}, [far, near])
    assert found == (near, [Change("torch", "2.13.0", "2.13.1")])
    old, new = entry("old", 1.0, torch="2.13.0"), entry("new", 2.0, torch="2.13.0")
    other = entry("other", 3.0, torch="1.0")
    for entries in ([old, new, other], [other, new, old]):
        found = closest({"torch": "2.13.1"}, entries)
        assert found is not None
        assert found[0] is new
    assert closest({"torch": "2.13.1"}, []) is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (None, "cache miss: nothing is stored yet"),
        ([], "cache miss: an entry with these factors is there, but it is incomplete or cannot be used"),
        ([Change("torch", "2.13.0", "2.13.1")], "cache miss: torch 2.13.0 -> 2.13.1"),
        ([Change("a", None, "1"), Change("b", "2", None)], "cache miss: a unset -> 1, b 2 -> unset"),
        ([Change("a.b", "***12", "***34")], "cache miss: a.b has another value"),
        ([Change("a.b:", None, "***34")], "cache miss: a.b: unset -> ***"),
        ([Change("a.b", "auto", "***34")], "cache miss: a.b auto -> ***"),
        ([Change("f.forward has other code", None, None)], "cache miss: f.forward has other code"),
        ([Change(f"f{i}", "a", "b") for i in range(9)], "cache miss: f0 a -> b, f1 a -> b, f2 a -> b and 6 more"),
        (  # a config.json may hold anything: what a terminal would act on is written out
            [Change("config.a\n", "\x1b[31mred", "\nINFO all is well\r\u202e\x9b\u200b")],
            r"cache miss: config.a\n \x1b[31mred -> \nINFO all is well\r\u202e\x9b\u200b",
        ),
    ],
)
def test_the_line_says_what_changed(changes: list[Change] | None, line: str) -> None:
    assert summary(changes) == line


@pytest.mark.parametrize("place", [0, 500, 999])
def test_of_long_values_the_line_shows_where_they_differ(place: int) -> None:
    old = "x" * 1000
    line = summary([Change("config", old, old[:place] + "DIFFERENT" + old[place:])])
    assert "DIFFERENT" in line
    assert len(line) < 150


# --- the misses that are kept


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def record(tree: Tree, torch: str) -> Miss:
    new = {"torch": torch}
    miss = Miss(key_of(new), "rank0", "llama", new, key_of(OLD), difference(OLD, new))
    misses.record(tree, miss)
    return miss


def test_what_was_recorded_is_read(tree: Tree) -> None:
    assert misses.read(tree) == []
    before = time.time()
    miss = record(tree, "2.13.1")
    assert misses.read(tree) == [miss]
    assert before <= miss.time <= time.time()
    first = Miss("k", "rank0", "llama", {}, None, None)
    misses.record(tree, first)
    assert misses.read(tree) == [first, miss]


def test_the_last_ones_are_kept_newest_first_whatever_the_clock(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(misses.KEPT + 5):
        record(tree, f"2.{number}")
    monkeypatch.setattr(time, "time", lambda: 1.0)
    record(tree, "the last")
    expected = ["the last", *(f"2.{number}" for number in reversed(range(6, misses.KEPT + 5)))]
    assert [miss.factors["torch"] for miss in misses.read(tree)] == expected
    assert len(list((tree.path / "misses").iterdir())) == misses.KEPT


def test_ranks_that_miss_at_the_same_time_keep_one_each(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misses, "_names", lambda tree: [])
    for rank in range(3):
        monkeypatch.setattr(os, "getpid", lambda rank=rank: 100 + rank)
        record(tree, f"2.{rank}")
    monkeypatch.undo()
    assert len(misses.read(tree)) == 3


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 10000, b"\xff", b'{"format": 2}', b"another format"])
def test_a_damaged_one_is_left_out(tree: Tree, data: bytes) -> None:
    whole = record(tree, "2.13.1")
    record(tree, "2.13.2")
    newest = max((tree.path / "misses").iterdir())
    other = newest.read_bytes().replace(b'"format":2', b'"format":3')
    newest.write_bytes(other if data == b"another format" else data)
    (tree.path / "misses" / "000000000009-1.json").symlink_to(newest)
    (tree.path / "misses" / "other.json").write_bytes(b"")
    assert misses.read(tree) == [whole]
