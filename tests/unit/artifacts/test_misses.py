from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_compile_ext.artifacts import files, misses
from vllm_compile_ext.artifacts.key import Change, difference, key_of
from vllm_compile_ext.artifacts.layout import Layout

OLD = {"torch": "2.13.0"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def record(layout: Layout, torch: str, **changes: Any) -> str:
    new = {"torch": torch}
    values: dict[str, Any] = {"closest_key": key_of(OLD), "changes": difference(OLD, new)}
    misses.record(layout, key_of(new), "rank0", "llama", new, **(values | changes))
    return key_of(new)


def test_what_was_recorded_is_read(layout: Layout) -> None:
    before = time.time()
    key = record(layout, "2.13.1")
    (found,) = misses.read(layout)
    assert (found.key, found.shard, found.model, found.factors) == (key, "rank0", "llama", {"torch": "2.13.1"})
    assert (found.closest, found.changes) == (key_of(OLD), [Change("torch", "2.13.0", "2.13.1")])
    assert before <= found.time <= time.time()


def test_a_miss_of_an_empty_store(layout: Layout) -> None:
    record(layout, "2.13.1", closest_key=None, changes=None)
    assert (misses.read(layout)[0].closest, misses.read(layout)[0].changes) == (None, None)


def test_the_last_ones_are_kept_newest_first(layout: Layout) -> None:
    assert misses.read(layout) == []
    for number in range(misses.KEPT + 5):
        record(layout, f"2.{number}")
    expected = [f"2.{number}" for number in reversed(range(5, misses.KEPT + 5))]
    assert [miss.factors["torch"] for miss in misses.read(layout)] == expected
    assert len(list(layout.misses.iterdir())) == misses.KEPT


def test_a_clock_set_back_loses_none(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(misses.KEPT):
        record(layout, f"2.{number}")
    monkeypatch.setattr(time, "time", lambda: 1.0)
    record(layout, "the last")
    assert misses.read(layout)[0].factors["torch"] == "the last"


def test_ranks_that_miss_at_the_same_time_keep_one_each(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misses, "_numbered", lambda layout: [])
    for rank in range(3):
        monkeypatch.setattr(misses.os, "getpid", lambda rank=rank: 100 + rank)
        record(layout, f"2.{rank}")
    monkeypatch.undo()
    assert len(misses.read(layout)) == 3


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 10000, b"\xff", b'{"format": 2}'])
def test_a_damaged_one_is_left_out(layout: Layout, data: bytes) -> None:
    key = record(layout, "2.13.1")
    record(layout, "2.13.2")
    newest = max(layout.misses.iterdir())
    newest.write_bytes(data)
    (layout.misses / "000000000009-1.json").symlink_to(newest)
    (layout.misses / "other.json").write_bytes(b"")
    assert [miss.key for miss in misses.read(layout)] == [key]


def test_one_of_another_format_is_left_out(layout: Layout) -> None:
    record(layout, "2.13.1")
    path = next(layout.misses.iterdir())
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":2'))
    assert misses.read(layout) == []


def test_a_full_disk_is_for_the_caller_to_tell(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record(layout, "2.13.1")
    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        record(layout, "2.13.2")
    assert len(misses.read(layout)) == 1
