"""A store is its owner's alone, and one that others can write is refused with the command that mends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.store import program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.store import DamagedError, Store, UnsafeStoreError

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


# --- real other users: this process forks, and the fork becomes one

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
ME, OTHER, GROUP = 4001, 4002, 4100


def as_user(uid: int, function: Callable[[], Any], groups: Sequence[int] = ()) -> Any:
    """What `function` returns, or the name and message of what it raises, when the user `uid` calls it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups(list(groups))
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            found: Any = function()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = json.loads(answer.read() or "null")
    os.waitpid(child, 0)
    return found


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


def wrote(root: Path) -> str:
    store = Store.open(root)
    with store.writer("0" * 64, 5) as mine:
        return program.write(store, "model").key if mine else "not mine"


def found(root: Path) -> bool:
    return any(program.load(Store.open(root), m) == program.members("model") for m in Store.open(root).manifests())


@root_only
def test_another_users_store_is_refused(place: Path) -> None:
    give(place / "theirs", OTHER, 0o755)
    assert len(as_user(OTHER, lambda: wrote(place / "theirs" / "store"))) == 64
    (place / "theirs" / "store").chmod(0o755)
    assert "UnsafeStoreError: " in as_user(ME, lambda: wrote(place / "theirs" / "store"))
    assert f"belongs to user {OTHER}, this process to user {ME}" in as_user(ME, lambda: wrote(place / "theirs"))


@root_only
def test_what_root_left_is_read(place: Path) -> None:
    wrote(place / "store")
    subprocess.run(["chmod", "-R", "a+rX", place], check=True)
    assert as_user(ME, lambda: found(place / "store")) is True
    assert as_user(ME, lambda: wrote(place / "store")) == "not mine"


@root_only
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_above_that_others_can_write(place: Path, mode: int) -> None:
    give(place / "open", 0, mode, GROUP)
    give(place / "open" / "mine", ME, 0o700)
    text = as_user(ME, lambda: wrote(place / "open" / "mine" / "store"))
    assert f"{place / 'open'} can be written by other users (mode 0{mode:o}, user 0, group {GROUP})" in text
    assert "another store could be put in the place" in text
    (place / "open").chmod(0o1777)  # nobody can move what is another's
    assert len(as_user(ME, lambda: wrote(place / "open" / "mine" / "store"))) == 64


@root_only
def test_a_folder_above_that_belongs_to_another(place: Path) -> None:
    give(place / "theirs", OTHER, 0o755)
    give(place / "theirs" / "mine", ME, 0o700)
    assert f"{place / 'theirs'} belongs to user {OTHER}" in as_user(
        ME, lambda: wrote(place / "theirs" / "mine" / "store")
    )


@root_only
def test_a_users_own_group_may_write_above(place: Path) -> None:
    """As where the umask is 002 and each user has a group of the same number."""
    give(place / "home", ME, 0o775, ME)
    assert len(as_user(ME, lambda: wrote(place / "home" / "cache" / "store"))) == 64


@root_only
def test_a_store_that_is_swapped_after_it_was_opened_is_not_looked_at(place: Path) -> None:
    """Not even where everyone may swap it: what is open stays open."""
    root = place / "store"
    store = Store.open(root)
    mine = program.write(store, "model")
    give(place / "forged", OTHER, 0o755)
    forged = Store.open(place / "evil")
    evil = program.write(forged, "model")
    blob = next(iter(evil.members.values()))
    forged.path(blob).write_bytes(b"evil".ljust(blob.size))
    root.rename(place / "moved")
    (place / "evil").rename(root)
    subprocess.run(["chown", "-R", str(OTHER), root], check=True)
    assert program.load(store, mine) == program.members("model")
    with pytest.raises(UnsafeStoreError):
        Store.open(root)


@root_only
@pytest.mark.parametrize("name", ["v1", "v1/blobs", "v1/manifests"])
def test_a_folder_that_is_swapped_for_anothers_is_not_read(place: Path, name: str) -> None:
    root = place / "store"
    store = Store.open(root)
    mine = program.write(store, "model")
    (root / name).rename(place / "moved")
    shutil.copytree(place / "moved", root / name)
    os.chown(root / name, OTHER, -1)
    if name == "v1":  # it is open
        assert program.load(store, mine) == program.members("model")
    elif name == "v1/blobs":
        with pytest.raises(DamagedError, match=f"belongs to user {OTHER}"):
            program.load(store, mine)
    else:
        assert store.find(mine.key, "rank0") is None
    assert Store.open(place / "new").find(mine.key, "rank0") is None
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
    assert program.load(store, mine) == program.members("model")


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
@pytest.mark.parametrize("mode", [0o2777, 0o3777])
def test_where_everyone_can_write_a_group_says_nothing_of_who_made_it(
    place: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files get the group of a setgid folder, whoever makes them."""
    monkeypatch.setenv("VLLM_COMPILE_STORE_GROUP", "1")
    give(place / "open", 0, mode, GROUP)
    root = place / "open" / "store"

    def plant() -> None:
        os.umask(0o007)
        for path in (root, root / "v1", *(root / "v1" / room for room in ("blobs", "manifests", "locks", "tmp"))):
            path.mkdir(mode=0o2770)

    as_user(OTHER, plant)
    assert root.stat().st_gid == GROUP
    assert "UnsafeStoreError" in as_user(ME, lambda: wrote(root), [GROUP])


@root_only
def test_members_that_start_at_once_share(shared: Path) -> None:
    for _ in range(15):
        shutil.rmtree(shared / "v1", ignore_errors=True)
        with ThreadPoolExecutor(3) as pool:
            found = list(
                pool.map(lambda uid: as_user(uid, lambda: Store.open(shared).writable, [GROUP]), (ME, OTHER, 4003))
            )
        assert found == [True] * 3


@root_only
def test_a_group_is_not_everyone(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(ME, lambda: wrote(shared), [GROUP])
    blobs = shared / "v1" / "blobs"
    blobs.chmod(0o2777)
    assert "can be written by other users (mode 2777" in as_user(ME, lambda: found(shared), [GROUP])
    blobs.chmod(0o2770)
    os.chown(blobs, -1, 4200)
    assert "can be written by other users" in as_user(ME, lambda: found(shared), [GROUP])
    os.chown(blobs, -1, GROUP)
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
