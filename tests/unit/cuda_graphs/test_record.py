"""What is remembered of a model's graphs: a small file, which may be damaged in any way."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tests.unit.store.conftest import disk, user
from vllm_compile_ext.cuda_graphs.record import FORMAT, KEPT, Record, Used, key_of, read, write
from vllm_compile_ext.store.files import UnsafeStoreError
from vllm_compile_ext.store.store import seal

__all__ = ["disk", "user"]

KEY, OTHER = key_of(["model", 1]), key_of(["model", 2])
RECORD = Record(
    base=100_000_000,
    held=300_000_000,
    graphs=12,
    each={"FULL": 3_000_000},
    needed=400_000_000,
    used=[Used(0, 7), Used(50, 1)],
)


def path_of(root: Path, key: str = KEY) -> Path:
    return root / "v1" / "graphs" / f"{key}.json"


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert read(tmp_path, KEY) is None
    write(tmp_path, KEY, RECORD)
    assert read(tmp_path, KEY) == RECORD
    assert read(tmp_path, OTHER) is None
    changed = msgspec.structs.replace(RECORD, graphs=13)
    write(tmp_path, KEY, changed)
    assert read(tmp_path, KEY) == changed


def test_a_record_is_owner_only_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "store", KEY, RECORD)
    path = path_of(tmp_path / "store")
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o600, 0o700]
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == [path]


def test_keys_differ_with_each_part_and_are_plain_names() -> None:
    keys = {key_of(parts) for parts in (["a", 1], ["a", "1"], ["a1"], [1, "a"], ["a", 1, None])}
    assert len(keys) == 5
    assert all(len(key) == 32 and key.isalnum() for key in keys)
    assert key_of(("a", 1)) == key_of(["a", 1])


@pytest.mark.parametrize("position", range(0, 260, 5))
def test_one_flipped_bit_and_there_is_no_record(tmp_path: Path, position: int) -> None:
    write(tmp_path, KEY, RECORD)
    path = path_of(tmp_path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)
    assert read(tmp_path, KEY) is None


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "not text": lambda data: b"\xff\xfe" + data,
    "another kind": lambda data: b"[1, 2]",
    "null": lambda data: b"null",
    "nested": lambda data: b"[" * 100_000,
    "digits": lambda data: b"9" * 10_000,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_is_none_and_is_replaced(tmp_path: Path, kind: str) -> None:
    write(tmp_path, KEY, RECORD)
    path = path_of(tmp_path)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    assert read(tmp_path, KEY) is None
    write(tmp_path, KEY, RECORD)
    assert read(tmp_path, KEY) == RECORD


def test_the_record_of_another_model_is_none(tmp_path: Path) -> None:
    write(tmp_path, OTHER, RECORD)
    path_of(tmp_path, OTHER).rename(path_of(tmp_path))
    assert read(tmp_path, KEY) is None


def test_what_is_no_file_is_none(tmp_path: Path) -> None:
    write(tmp_path, OTHER, RECORD)
    path = path_of(tmp_path)
    path.symlink_to(path_of(tmp_path, OTHER))
    assert read(tmp_path, KEY) is None
    path.unlink()
    path.mkdir()
    assert read(tmp_path, KEY) is None
    path.rmdir()
    os.mkfifo(path)  # opening it must not wait
    assert read(tmp_path, KEY) is None


WRONG = {
    "negative held": {"held": -1},
    "negative graphs": {"graphs": -1},
    "negative needed": {"needed": -1},
    "negative number": {"used": [{"number": -1, "batches": 1}]},
    "negative batches": {"used": [{"number": 1, "batches": -1}]},
    "huge": {"needed": 1 << 63},
    "a fraction": {"held": 1.5},
    "no number": {"held": "1"},
    "one field more": {"more": 1},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_record_with_wrong_values_is_none(tmp_path: Path, kind: str) -> None:
    write(tmp_path, KEY, RECORD)
    inner = {"key": KEY, "record": msgspec.to_builtins(RECORD) | WRONG[kind]}
    path_of(tmp_path).write_bytes(seal(inner, FORMAT))
    assert read(tmp_path, KEY) is None


def test_a_record_of_another_format_is_none(tmp_path: Path) -> None:
    write(tmp_path, KEY, RECORD)
    inner = {"key": KEY, "record": RECORD}
    path_of(tmp_path).write_bytes(seal(inner, FORMAT))
    assert read(tmp_path, KEY) == RECORD
    path_of(tmp_path).write_bytes(seal(inner, FORMAT + 1))
    assert read(tmp_path, KEY) is None


def test_the_oldest_records_go(tmp_path: Path) -> None:
    keys = [key_of([n]) for n in range(KEPT + 5)]
    for number, key in enumerate(keys):
        write(tmp_path, key, RECORD)
        os.utime(path_of(tmp_path, key), (number, number))
    write(tmp_path, keys[0], RECORD)  # used again
    assert len(list(path_of(tmp_path).parent.iterdir())) == KEPT
    assert [read(tmp_path, key) for key in (keys[0], keys[1], keys[5], keys[-1])] == [RECORD, None, None, RECORD]


def test_a_read_only_folder_raises_when_written_and_can_be_read(user: Path) -> None:
    write(user, KEY, RECORD)
    for folder in (user / "v1" / "tmp", user / "v1" / "graphs"):
        folder.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        write(user, KEY, msgspec.structs.replace(RECORD, graphs=1))
    assert read(user, KEY) == RECORD
    for folder in (user / "v1" / "tmp", user / "v1" / "graphs"):
        folder.chmod(0o700)


def test_a_full_disk_raises_and_leaves_the_record(disk: Path) -> None:
    write(disk / "store", KEY, RECORD)
    with pytest.raises(OSError, match="No space left"):
        write(disk / "store", KEY, msgspec.structs.replace(RECORD, used=[Used(n, n) for n in range(200_000)]))
    assert read(disk / "store", KEY) == RECORD


def test_a_record_that_cannot_be_read_is_none(user: Path) -> None:
    write(user, KEY, RECORD)
    path_of(user).chmod(0)
    assert read(user, KEY) is None
    path_of(user).chmod(0o600)


@pytest.mark.parametrize("part", ["", "v1", "v1/graphs"])
def test_a_store_that_others_can_write_is_not_used(tmp_path: Path, part: str) -> None:
    root = tmp_path / "store"
    write(root, KEY, RECORD)
    (root / part).chmod(0o777)
    assert read(root, KEY) is None
    with pytest.raises(UnsafeStoreError, match="can be written by other users"):
        write(root, KEY, RECORD)
    (root / part).chmod(0o700)
    assert read(root, KEY) == RECORD
