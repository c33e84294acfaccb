"""Writers that are killed, race, hang, or find no room or locks: readers see whole entries or none.

A disk that is full, with a model that is to be kept there, is in `tests/integration/test_faults.py`.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests import process
from tests.conftest import FULL
from tests.unit.store import bundles, program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.bundle import BundleError, pack, unpack
from vllm_compile_ext.store.store import DamagedError, Store

KEY = program.key_of(program.factors("model"))


def whole(store: Store) -> int:
    """How many entries there are; each of them loads, and no other file is taken for one."""
    found = list(store.manifests())
    for manifest in found:
        program.load(store, manifest)
    assert store.verify() == []
    return len(found)


def temporary(store: Store) -> list[Path]:
    return list((store.tree.path / "tmp").iterdir())


def write(store: Store, name: str = "model") -> None:
    with store.writer(program.key_of(program.factors(name)), 30) as mine:
        assert mine
        program.write(store, name, count=2)


def test_a_writer_killed_at_each_step_leaves_whole_entries(tmp_path: Path) -> None:
    for step in itertools.count():
        store = Store.open(tmp_path / str(step))
        done = program.ended(program.fork(partial(write, store), ("mkdir", "open", "fsync", "replace"), step)) == 0
        committed = whole(store)
        write(store)
        assert whole(store) == 1
        if done:
            break
    assert committed == 1
    assert step > 20


def test_a_collector_killed_at_each_step_leaves_whole_entries(tmp_path: Path) -> None:
    for step in itertools.count():
        store = Store.open(tmp_path / str(step))
        for name in ("one", "other"):
            program.leave(store, name, count=2)
        child = program.fork(partial(evict.trim, store, max_bytes=0), ("unlink", "rmdir"), step)
        done = program.ended(child) == 0
        whole(store)
        if done:
            break
    assert step == 7  # two manifests, three blobs, two folders


def test_processes_that_write_pack_unpack_and_clean_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    names = ("one", "two", "three")
    old = Store.open(tmp_path / "old")
    for name in names:
        bundles.entry(old, name, created=1.0, members={"plan": old.put(f"older {name}".encode())})
    pack(old, tmp_path / "older")
    root, chance = tmp_path / "store", random.Random(15)
    works: list[Callable[[Store], object]] = [
        lambda store: [write(store, name) for name in names],
        lambda store: unpack(store, tmp_path / "older", allow_unsigned=True, replace=True),
        lambda store: pack(store, tmp_path / "out"),
        lambda store: evict.trim(store, max_bytes=store.size() - 1500),
    ]

    def start(work: Callable[[Store], object]) -> None:
        with suppress(BundleError, OSError, DamagedError):  # of which it is told
            work(Store.open(root))

    for _ in range(60 if FULL else 6):
        children = [program.fork(partial(start, chance.choice(works))) for _ in range(3)]
        assert [program.ended(child) for child in children] == [0] * 3
        store = Store.open(root)
        whole(store)
        for found in store.manifests():
            either = program.members(found.model, 2), {"plan": f"older {found.model}".encode()}
            assert program.load(store, found) in either


def test_bytes_are_durable_before_they_have_a_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, call=call, **kwargs: (calls.append(name), call(*args, **kwargs))[1]
        )
    program.write(store, "model", count=2)
    assert calls == ["fsync", "replace", "fsync"] * 3  # the file, its name, the name's folder


def test_of_eight_processes_starting_cold_one_writes_and_the_others_load(store: Store) -> None:
    def start_cold() -> None:
        found = store.find(KEY, "rank0")
        if found is None:
            with store.writer(KEY, 60) as mine:
                assert mine
                found = store.find(KEY, "rank0")
                if found is None:
                    time.sleep(0.1)  # compiles
                    found = program.write(store, "model")
                    (store.root / f"wrote {os.getpid()}").touch()
        assert program.load(store, found) == program.members("model")

    assert [program.ended(child) for child in [program.fork(start_cold) for _ in range(8)]] == [0] * 8
    assert len(list(store.root.glob("wrote *"))) == 1
    assert whole(store) == 1


def test_bytes_that_are_there_are_not_written_again(store: Store) -> None:
    first, second = program.write(store, "model"), program.write(store, "other")
    shared = first.members["piece/0/(1, 256)"]
    assert second.members["piece/0/(1, 256)"] == shared
    inode = store.path(shared).stat().st_ino
    data = [store.get(blob) for blob in first.members.values()] * 4
    with ThreadPoolExecutor(8) as pool:
        blobs = list(pool.map(store.put, data))
    assert [store.get(blob) for blob in blobs] == data
    assert store.path(shared).stat().st_ino == inode
    assert len(list((store.tree.path / "blobs").glob("*/*"))) == 7  # 4 each, one of them shared
    assert temporary(store) == []


def test_a_file_that_may_be_mapped_is_replaced_and_not_written(store: Store) -> None:
    data = b"some data"
    blob = store.put(data)
    with store.path(blob).open("rb") as opened:
        os.truncate(store.path(blob), 7)
        assert store.put(data) == blob
        assert len(opened.read()) == 7
    assert store.get(blob) == data


# --- locks


def test_a_hanging_writer_is_waited_for_with_a_bound(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    held = ExitStack()  # that its process alone enters, and keeps
    with program.meanwhile(lambda: held.enter_context(store.writer(KEY, 30))) as kill:
        for timeout in (0, 0.2, -1):
            with store.writer(KEY, timeout) as mine:
                assert not mine
        assert "not waiting for it" in caplog.text
        with store.writer("0" * 64, 5) as mine:  # another key is free
            assert mine
        kill()
        with store.writer(KEY, 5) as mine:
            assert mine


def test_threads_of_one_process_write_one_at_a_time(store: Store) -> None:
    def attempt() -> bool:
        with store.writer(KEY, 0.1) as mine:
            return mine

    with ThreadPoolExecutor(1) as other:
        with store.writer(KEY, 5) as mine:
            assert mine
            assert not other.submit(attempt).result()
        assert other.submit(attempt).result()


def test_the_lock_is_given_back_also_by_a_writer_that_fails_or_has_forked(store: Store) -> None:
    with ExitStack() as forked:
        with suppress(ZeroDivisionError), store.writer(KEY, 5):
            forked.enter_context(program.meanwhile(lambda: None))
            raise ZeroDivisionError
        assert program.ended(program.fork(partial(write, store))) == 0
        assert len(evict.trim(store, max_bytes=0).manifests) == 1


# --- file systems


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_it_is_read_and_not_written(
    store: Store, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS v3 without a lock daemon, SMB with nobrl."""
    written = program.leave(store, "model")
    monkeypatch.setattr(fcntl, "flock", program.raising(number))
    assert store.find(written.key, "rank0") == written
    store.use(written)
    with store.writer(KEY, 5) as mine:
        assert not mine
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"the store {store.root} cannot be locked" in record.getMessage()
    with pytest.raises(OSError, match=os.strerror(number)):
        evict.trim(store, max_bytes=0)
    assert program.load(store, written) == program.members("model")


def test_what_some_file_systems_cannot_do_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SMB and FUSE often have no links, SMB and vfat give every file the mode of the mount."""
    fsync = os.fsync

    def fsync_of_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    for call in ("link", "symlink", "fchmod", "fchown"):
        monkeypatch.setattr(os, call, program.raising(errno.EPERM))
    monkeypatch.setattr(os, "fsync", fsync_of_files)
    store = Store.open(tmp_path / "store")
    write(store)
    assert whole(store) == 1


def test_names_that_nfs_keeps_for_those_who_still_read(store: Store) -> None:
    written = program.leave(store, "model")
    for folder in (store.tree.path / "tmp", store.path(written).parent, *(store.tree.path / "blobs").iterdir()):
        (folder / ".nfs000000000001").write_bytes(b"")
    assert whole(store) == 1
    assert len(evict.trim(store, max_bytes=0).manifests) == 1
    assert store.size() == 0


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(store: Store, call: str) -> None:
    kept = program.write(store, "kept")
    again = program.manifest(store, "kept", {})
    before = {path for path in store.root.rglob("*") if path.is_file()}
    new = {f"{index}": os.urandom(100) for index in range(200)}  # some of them need a new folder
    with program.failing([call], 0):
        with pytest.raises(OSError, match="No space left"):
            program.manifest(store, "new", new)
        if call != "mkdir":
            with pytest.raises(OSError, match="No space left"):
                store.commit(again)
    assert call == "mkdir" or {path for path in store.root.rglob("*") if path.is_file()} == before
    assert temporary(store) == []
    assert store.find(kept.key, "rank0") == kept
    assert whole(store) == 1


@pytest.mark.parametrize("where", ["disk", "user"])
def test_a_store_that_can_only_be_read(
    where: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """A read-only mount, and folders without the mode to write."""
    root = request.getfixturevalue(where) / "store"
    written = program.write(Store.open(root), "model")
    if where == "disk":
        subprocess.run(["mount", "-o", "remount,ro", root.parent], check=True)
    else:
        for path in root.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
    caplog.set_level("INFO")
    store = Store.open(root, max_bytes=0)
    assert not store.writable
    assert f"{store.root} cannot be written" in caplog.text
    assert store.find(written.key, "rank0") == written
    store.use(written)
    with store.writer(written.key, 5) as mine:
        assert not mine
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    with pytest.raises(OSError, match=r"Read-only|Permission denied"):
        store.put(b"new")
    with pytest.raises(OSError, match=r"Read-only|Permission denied"):
        store.commit(written)
    if where == "disk":
        with pytest.raises(OSError, match="Read-only"):
            evict.trim(store)
    assert whole(store) == 1
    if where == "user":
        for path in (store.tree.path, *store.tree.path.rglob("*")):
            path.chmod(0o700)


@pytest.mark.parametrize(("where", "place"), [("disk", "cache/store"), ("tmp_path", "file/store")])
def test_a_root_that_cannot_be_made(where: str, place: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(where)
    (folder / "file").write_bytes(b"")
    if where == "disk":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    store = Store.open(folder / place)
    assert not store.writable
    assert store.find(KEY, "rank0") is None
    assert (store.verify(), list(store.manifests()), store.size()) == ([], [], 0)
    with pytest.raises(OSError, match=r"Read-only|Not a directory"):
        store.put(b"new")


def test_the_store_needs_neither_vllm_nor_torch() -> None:
    code = "import sys, vllm_compile_ext.key.misses, vllm_compile_ext.store.bundle\n"
    code += "print([name for name in ('torch', 'vllm', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=process.environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
