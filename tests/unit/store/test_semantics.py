"""What network file systems do differently, done to a store: NFS (v3 and v4) and SMB as Linux mounts them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.store import program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.files import DamagedError, MissingError
from vllm_compile_ext.store.store import Store


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_it_is_read_and_not_written(
    store: Store, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS v3 without a lock daemon, SMB with nobrl."""
    written = program.leave(store, "model")
    monkeypatch.setattr(fcntl, "flock", failing(number))
    found = store.find(written.key, "rank0")
    assert found is not None
    assert program.load(store, found) == program.members("model")
    store.use(found)
    with store.writer("0" * 64, 5) as mine:
        assert not mine
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"the store {store.root} cannot be locked" in record.getMessage()
    with pytest.raises(OSError, match=os.strerror(number)):
        evict.trim(store, max_bytes=0)
    assert program.load(store, written) == program.members("model")


def test_nothing_is_linked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """SMB and many FUSE file systems have no hard links, and some no symbolic ones."""
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(os, "symlink", failing(errno.EPERM))
    with store.writer("0" * 64, 5) as mine:
        assert mine
        written = program.write(store, "model")
    assert program.load(store, written) == program.members("model")


@pytest.mark.parametrize("call", ["fchmod", "fchown"])
def test_modes_that_cannot_be_changed(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SMB and vfat give every file the mode of the mount."""
    monkeypatch.setattr(os, call, failing(errno.EPERM))
    store = Store.open(tmp_path / "store")
    with store.writer("0" * 64, 5) as mine:
        assert mine
        written = program.write(store, "model")
    assert program.load(store, written) == program.members("model")


def test_a_folder_cannot_be_synced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def sync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    written = program.write(store, "model")
    assert program.load(store, written) == program.members("model")


def test_a_file_that_another_machine_replaced_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the open file is stale."""
    written = program.write(store, "model")
    blob = written.members["piece/1/(1, 256)"]
    opened = os.open

    def stale(name: Any, *args: Any, **kwargs: Any) -> int:
        if name == blob.digest:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", stale)
    with pytest.raises(DamagedError, match="cannot be read"):
        store.get(blob)
    monkeypatch.undo()
    assert store.get(blob)


def test_a_manifest_that_is_visible_before_its_blobs(store: Store) -> None:
    """Late visibility: it is a miss, and another process's blobs are there when they have come."""
    written = program.write(store, "model")
    blob = written.members["piece/1/(1, 256)"]
    hidden = store.root / "hidden"
    store.path(blob).rename(hidden)
    assert store.find(written.key, "rank0") == written
    with pytest.raises(MissingError):
        program.load(store, written)
    hidden.rename(store.path(blob))
    assert program.load(store, written) == program.members("model")


def test_names_that_nfs_keeps_for_those_who_still_read(store: Store) -> None:
    written = program.leave(store, "model")
    for folder in (store.tree.path / "tmp", store.path(written).parent, *(store.tree.path / "blobs").iterdir()):
        (folder / ".nfs000000000001").write_bytes(b"")
    assert store.verify() == []
    assert list(store.manifests()) == [written]
    assert len(evict.trim(store, max_bytes=0).manifests) == 1
    assert store.size() == 0


def test_a_rename_over_an_open_file(store: Store) -> None:
    written = program.write(store, "model")
    blob = written.members["piece/1/(1, 256)"]
    with store.path(blob).open("rb") as opened:
        before = os.fstat(opened.fileno()).st_ino
        os.truncate(store.path(blob), 7)
        assert store.put(program.members("model")["piece/1/(1, 256)"]) == blob
        assert store.path(blob).stat().st_ino != before, "a file that may be mapped is never written again"
        assert len(opened.read()) == 7
    assert program.load(store, written) == program.members("model")


def test_a_clock_that_is_not_that_of_the_server(store: Store) -> None:
    written = program.leave(store, "model")
    for path in store.root.rglob("*"):
        os.utime(path, (4e9, 4e9))
    evict.trim(store, max_age=1)
    assert program.load(store, written) == program.members("model")
