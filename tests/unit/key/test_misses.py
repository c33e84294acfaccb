from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_compile_ext.key import misses
from vllm_compile_ext.key.miss import Change, difference
from vllm_compile_ext.store.files import Tree
from vllm_compile_ext.store.store import key_of

OLD = {"torch": "2.13.0"}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def record(tree: Tree, torch: str, **changes: Any) -> str:
    new = {"torch": torch}
    values: dict[str, Any] = {"closest_key": key_of(OLD), "changes": difference(OLD, new)}
    misses.record(tree, key_of(new), "rank0", "llama", new, **(values | changes))
    return key_of(new)


def test_what_was_recorded_is_read(tree: Tree) -> None:
    before = time.time()
    key = record(tree, "2.13.1")
    (found,) = misses.read(tree)
    assert (found.key, found.shard, found.model, found.factors) == (key, "rank0", "llama", {"torch": "2.13.1"})
    assert (found.closest, found.changes) == (key_of(OLD), [Change("torch", "2.13.0", "2.13.1")])
    assert before <= found.time <= time.time()


def test_a_miss_of_an_empty_store(tree: Tree) -> None:
    record(tree, "2.13.1", closest_key=None, changes=None)
    assert (misses.read(tree)[0].closest, misses.read(tree)[0].changes) == (None, None)


def test_the_last_ones_are_kept_newest_first(tree: Tree) -> None:
    assert misses.read(tree) == []
    for number in range(misses.KEPT + 5):
        record(tree, f"2.{number}")
    expected = [f"2.{number}" for number in reversed(range(5, misses.KEPT + 5))]
    assert [miss.factors["torch"] for miss in misses.read(tree)] == expected
    assert len(list((tree.path / "misses").iterdir())) == misses.KEPT


def test_a_clock_set_back_loses_none(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(misses.KEPT):
        record(tree, f"2.{number}")
    monkeypatch.setattr(time, "time", lambda: 1.0)
    record(tree, "the last")
    assert misses.read(tree)[0].factors["torch"] == "the last"


def test_ranks_that_miss_at_the_same_time_keep_one_each(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misses, "_names", lambda tree: [])
    for rank in range(3):
        monkeypatch.setattr(misses.os, "getpid", lambda rank=rank: 100 + rank)
        record(tree, f"2.{rank}")
    monkeypatch.undo()
    assert len(misses.read(tree)) == 3


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 10000, b"\xff", b'{"format": 2}'])
def test_a_damaged_one_is_left_out(tree: Tree, data: bytes) -> None:
    key = record(tree, "2.13.1")
    record(tree, "2.13.2")
    newest = max((tree.path / "misses").iterdir())
    newest.write_bytes(data)
    ((tree.path / "misses") / "000000000009-1.json").symlink_to(newest)
    ((tree.path / "misses") / "other.json").write_bytes(b"")
    assert [miss.key for miss in misses.read(tree)] == [key]


def test_one_of_another_format_is_left_out(tree: Tree) -> None:
    record(tree, "2.13.1")
    path = next((tree.path / "misses").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"format":2', b'"format":3'))
    assert misses.read(tree) == []


def test_a_full_disk_is_for_the_caller_to_tell(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record(tree, "2.13.1")
    monkeypatch.setattr(Tree, "write", full)
    with pytest.raises(OSError, match="No space left"):
        record(tree, "2.13.2")
    assert len(misses.read(tree)) == 1
