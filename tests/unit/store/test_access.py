"""A store is its owner's alone, and one that others can write is refused with the command that mends it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.store import program
from vllm_compile_ext.store.store import Store, UnsafeStoreError

FOLDERS = [".", "v1", "v1/blobs", "v1/manifests", "v1/locks", "v1/tmp"]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_everything_is_made_owner_only_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    root = tmp_path / "store"
    with umask(mask):
        store = Store.open(root)
        with store.writer("0" * 64, 5) as mine:
            assert mine
            written = program.write(store, "model")
    assert store.writable
    assert program.load(store, written) == program.members("model")
    modes = {path: path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
    folders = {mode for path, mode in modes.items() if path.is_dir()}
    files = {mode for path, mode in modes.items() if path.is_file() and path.suffix != ".lock"}
    assert (folders, files) == ({0o700}, {0o600})
    assert not any(mode & 0o177 for path, mode in modes.items() if path.suffix == ".lock")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o720, 0o1777])
@pytest.mark.parametrize("name", FOLDERS)
def test_one_that_others_can_write_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    root = tmp_path / "the store"  # a name that needs quotes
    written = program.write(Store.open(root), "model")
    (root / name).chmod(mode)
    with pytest.raises(UnsafeStoreError, match="can be written by other users") as caught:
        Store.open(root)
    command = str(caught.value).partition("Run: ")[2]
    assert command == f"chmod -R go-w '{root}'"
    subprocess.run(command, shell=True, check=True)
    assert Store.open(root).find(written.key, "rank0") == written


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o500])
def test_one_that_others_can_only_read_is_fine(tmp_path: Path, mode: int) -> None:
    program.write(Store.open(tmp_path / "store"), "model")
    (tmp_path / "store").chmod(mode)
    assert len(list(Store.open(tmp_path / "store").manifests())) == 1


def test_a_folder_that_is_refused_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UnsafeStoreError):
        Store.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", FOLDERS)
def test_one_that_belongs_to_someone_else_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "store"
    program.write(Store.open(root), "model")
    os.chown(root / name, 4242, -1)
    with pytest.raises(UnsafeStoreError, match="belongs to user 4242, this process to user 0") as caught:
        Store.open(root)
    command = str(caught.value).partition("Run as root: ")[2]
    assert command == f"chown -R 0 {root}"
    subprocess.run(command, shell=True, check=True)
    assert len(list(Store.open(root).manifests())) == 1


def test_one_that_root_made_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if tmp_path.stat().st_uid:
        pytest.skip("needs files of root")
    Store.open(tmp_path / "store")
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    Store.open(tmp_path / "store")


def test_a_root_that_is_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    written = program.write(Store.open(tmp_path / "store"), "model")
    assert Store.open(tmp_path / "disk").find(written.key, "rank0") == written
    (tmp_path / "disk").chmod(0o777)
    with pytest.raises(UnsafeStoreError):
        Store.open(tmp_path / "store")


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.open(Path("store"))
    monkeypatch.chdir("/")
    written = program.write(store, "model")
    assert Store.open(tmp_path / "store").find(written.key, "rank0") == written
