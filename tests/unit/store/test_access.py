"""A store is its owner's alone, and one that others can write is refused with the command that mends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FULL
from tests.unit.store import program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.store import DamagedError, Store, UnsafeStoreError

FOLDERS = [".", "v1", "v1/blobs", "v1/manifests", "v1/locks", "v1/tmp"]
ME, OTHER, GROUP = 4001, 4002, 4100
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


def wrote(root: Path) -> str:
    """The key of an entry that is written to the store `root`, or what keeps it from being written."""
    store = Store.open(root)
    with store.writer("0" * 64, 5) as mine:
        return program.write(store, "model").key if mine else "not mine"


def found(root: Path) -> bool:
    store = Store.open(root)
    return any(program.load(store, entry) == program.members("model") for entry in store.manifests())


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_everything_is_made_owner_only_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    root = tmp_path / "store"
    before = os.umask(mask)
    try:
        wrote(root)
    finally:
        os.umask(before)
    assert found(root)
    modes = {path: path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
    folders = {mode for path, mode in modes.items() if path.is_dir()}
    files = {mode for path, mode in modes.items() if path.is_file() and path.suffix != ".lock"}
    assert (folders, files) == ({0o700}, {0o600})
    assert not any(mode & 0o177 for path, mode in modes.items() if path.suffix == ".lock")


@pytest.mark.parametrize(
    ("uid", "mode"),
    [(0, mode) for mode in (0o777, 0o770, 0o702, 0o720, 0o1777)] + [pytest.param(4242, 0o700, marks=root_only)],
)
@pytest.mark.parametrize("name", FOLDERS)
def test_one_that_others_can_change_is_refused(tmp_path: Path, name: str, uid: int, mode: int) -> None:
    root = tmp_path / "the store"  # a name that needs quotes
    wrote(root)
    (root / name).chmod(mode)
    if uid:
        os.chown(root / name, uid, -1)
    with pytest.raises(UnsafeStoreError) as caught:
        Store.open(root)
    text = str(caught.value)
    said, command = ("can be written by other users", f"chmod -R go-w '{root}'")
    if uid:
        said, command = ("belongs to user 4242, this process to user 0", f"chown -R 0 '{root}'")
    assert said in text
    assert text.endswith(command)
    subprocess.run(command, shell=True, check=True)
    assert found(root)


def test_one_that_others_can_only_read_is_fine(tmp_path: Path) -> None:
    wrote(tmp_path / "store")
    for mode in (0o755, 0o750, 0o500):
        (tmp_path / "store").chmod(mode)
        assert found(tmp_path / "store")


def test_a_folder_that_is_refused_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UnsafeStoreError):
        Store.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    wrote(tmp_path / "store")
    assert found(tmp_path / "disk")
    (tmp_path / "disk").chmod(0o777)
    with pytest.raises(UnsafeStoreError):
        Store.open(tmp_path / "store")


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.open(Path("store"))
    monkeypatch.chdir("/")
    program.write(store, "model")
    assert found(tmp_path / "store")


# --- real other users: this process forks, and the fork becomes one


def as_user(uid: int, function: Callable[[], Any], groups: Sequence[int] = ()) -> Any:
    """What `function` returns, or the name and message of what it raises, when the user `uid` calls it."""
    reading, writing = os.pipe()

    def work() -> None:
        os.setgroups(list(groups))
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            result = function()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(result).encode())

    child = program.fork(work)
    os.close(writing)
    with os.fdopen(reading) as answer:
        result = json.load(answer)
    assert program.ended(child) == 0
    return result


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everyone can get to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def give(path: Path, uid: int, mode: int, gid: int = -1) -> Path:
    path.mkdir(exist_ok=True)
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


ABOVE = "another store could be put in the place of"
# Owner, mode and group of a folder above a store of ME, and what is said where that is refused.
OUTER = [
    (0, 0o755, -1, ""),
    (0, 0o777, GROUP, f"can be written by other users (mode 0777, user 0, group {GROUP}): {ABOVE}"),
    (0, 0o775, GROUP, f"can be written by other users (mode 0775, user 0, group {GROUP}): {ABOVE}"),
    (0, 0o757, GROUP, f"can be written by other users (mode 0757, user 0, group {GROUP}): {ABOVE}"),
    (0, 0o1777, GROUP, ""),  # nobody can move what is another's
    (OTHER, 0o755, -1, f"belongs to user {OTHER}, this process to user {ME}: {ABOVE}"),
    (ME, 0o775, ME, ""),  # as where the umask is 002 and each user has a group of the same number
]


@root_only
@pytest.mark.parametrize(("uid", "mode", "gid", "refused"), OUTER)
def test_a_folder_above(place: Path, uid: int, mode: int, gid: int, refused: str) -> None:
    outer = give(place / "outer", uid, mode, gid)
    give(outer / "mine", ME, 0o700)
    text = as_user(ME, lambda: wrote(outer / "mine" / "store"))
    assert f"{outer} {refused}" in text if refused else len(text) == 64


@root_only
def test_another_users_store_is_refused_and_roots_is_read(place: Path) -> None:
    give(place / "theirs", OTHER, 0o755)
    assert len(as_user(OTHER, lambda: wrote(place / "theirs"))) == 64
    assert f"belongs to user {OTHER}, this process to user {ME}" in as_user(ME, lambda: wrote(place / "theirs"))
    wrote(place / "store")
    subprocess.run(["chmod", "-R", "a+rX", place], check=True)
    assert as_user(ME, lambda: found(place / "store")) is True
    assert as_user(ME, lambda: wrote(place / "store")) == "not mine"


@root_only
@pytest.mark.parametrize("name", [".", "v1", "v1/blobs", "v1/manifests"])
def test_a_folder_that_is_swapped_for_anothers_is_not_read(place: Path, name: str) -> None:
    """What is open stays open, whoever may swap it."""
    root = place / "store"
    store = Store.open(root)
    mine = program.write(store, "model")
    (root / name).rename(place / "moved")
    shutil.copytree(place / "moved", root / name)
    for path in (root / "v1/blobs").glob("*/*"):
        path.write_bytes(b"evil".ljust(path.stat().st_size))
    os.chown(root / name, OTHER, -1)
    if name in (".", "v1"):  # they are open
        assert program.load(store, mine) == program.members("model")
    elif name == "v1/blobs":
        with pytest.raises(DamagedError, match=f"belongs to user {OTHER}"):
            program.load(store, mine)
    else:
        assert store.find(mine.key, "rank0") is None
    with pytest.raises(UnsafeStoreError):
        Store.open(root)


@root_only
@pytest.mark.parametrize(("uid", "mode"), [(OTHER, 0o600), (0, 0o602), (0, 0o620), (OTHER, 0o666)])
def test_a_file_that_others_can_have_written_is_not_read(place: Path, uid: int, mode: int) -> None:
    store = Store.open(place / "store")
    mine = program.write(store, "model")
    for path in (store.path(next(iter(mine.members.values()))), store.path(mine)):
        os.chown(path, uid, -1)
        path.chmod(mode)
    with pytest.raises(DamagedError, match=r"can be written by other users|belongs to user"):
        program.load(store, mine)
    assert store.find(mine.key, "rank0") is None
    assert len(store.verify()) == 2
    program.write(store, "model")  # mends it
    assert found(place / "store")


# --- a store that a group shares


@pytest.fixture
def shared(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_COMPILE_STORE_GROUP", "1")
    return give(place / "shared", 0, 0o2775, GROUP)


@root_only
def test_members_of_a_group_share_a_store(shared: Path) -> None:
    key = as_user(ME, lambda: wrote(shared), [GROUP])
    assert as_user(OTHER, lambda: found(shared), [GROUP]) is True
    assert as_user(OTHER, lambda: wrote(shared), [GROUP]) == key
    assert as_user(OTHER, lambda: evict.trim(Store.open(shared), max_bytes=0).manifests, [GROUP]) == [f"{key}/rank0"]
    assert as_user(ME, lambda: wrote(shared), [GROUP]) == key
    assert "can be written by other users" in as_user(4003, lambda: found(shared))


@root_only
def test_members_that_start_at_once_share(shared: Path) -> None:
    for _ in range(15 if FULL else 4):
        shutil.rmtree(shared / "v1", ignore_errors=True)
        with ThreadPoolExecutor(3) as pool:
            users = (ME, OTHER, 4003)
            writable = pool.map(lambda uid: as_user(uid, lambda: Store.open(shared).writable, [GROUP]), users)
            assert list(writable) == [True] * 3


@root_only
@pytest.mark.parametrize("mode", [0o2777, 0o3777])
def test_where_everyone_can_write_a_group_says_nothing_of_who_made_it(shared: Path, mode: int) -> None:
    """Files get the group of a setgid folder, whoever makes them."""
    shared.chmod(mode)
    root = shared / "store"

    def plant() -> None:
        os.umask(0o007)
        for name in FOLDERS:
            (root / name).mkdir(mode=0o2770)

    as_user(OTHER, plant)
    assert root.stat().st_gid == GROUP
    assert "UnsafeStoreError" in as_user(ME, lambda: wrote(root), [GROUP])


@root_only
def test_a_group_is_not_everyone(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(ME, lambda: wrote(shared), [GROUP])
    for mode, group in ((0o2777, GROUP), (0o2770, 4200)):
        give(shared / "v1/blobs", ME, mode, group)
        assert f"can be written by other users (mode {mode:o}" in as_user(ME, lambda: found(shared), [GROUP])
    give(shared / "v1/blobs", ME, 0o2770, GROUP)
    monkeypatch.delenv("VLLM_COMPILE_STORE_GROUP")
    text = as_user(ME, lambda: found(shared), [GROUP])
    assert f"(mode 2775, user 0, group {GROUP})" in text
    assert f"To trust everyone in group {GROUP}, set VLLM_COMPILE_STORE_GROUP=1. Or: Run as user 0" in text


@root_only
def test_a_private_store_stays_private_where_groups_are_trusted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_STORE_GROUP", "1")
    give(place / "mine", ME, 0o700)
    assert len(as_user(ME, lambda: wrote(place / "mine"), [GROUP])) == 64
    assert {path.stat().st_mode & 0o077 for path in (place / "mine").rglob("*")} == {0}
