from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.process import run
from vllm_compile_ext import settings
from vllm_compile_ext.store import kernels
from vllm_compile_ext.store.store import Store

VARIABLES = {cache.variable for cache in kernels.CACHES}
ALL = {*VARIABLES, kernels.MARK}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without caches and a store that does not exist yet; changes of the environment end with the test."""
    chosen = ("TRITON_HOME", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "VLLM_DISABLE_COMPILE_CACHE")
    for name in (*ALL, *chosen):
        monkeypatch.setenv(name, "so that the value of now comes back after the test")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def seen() -> dict[str, str]:
    return {name: os.environ[name] for name in ALL if name in os.environ}


@pytest.mark.parametrize("mask", [0, 0o022])
@pytest.mark.parametrize("there", [False, True])
def test_each_cache_gets_a_private_folder_in_the_store(store: Path, there: bool, mask: int) -> None:
    """Also below one that others can read: libraries make folders there by the umask."""
    before = os.umask(mask)
    try:
        if there:
            (store / "v1/jit").mkdir(parents=True)
            for path in (store, store / "v1", store / "v1/jit"):
                path.chmod(0o755)
        undo = kernels.use()
    finally:
        os.umask(before)
    assert seen().keys() == ALL
    assert kernels.folder() == store / "v1/jit"
    for cache in kernels.CACHES:
        place = Path(os.environ[cache.variable])
        assert place.is_relative_to(store / "v1/jit" / cache.name)
        for level in (place, *place.parents):
            if level.is_relative_to(store / "v1/jit"):
                assert stat.S_IMODE(level.stat().st_mode) == 0o700
    undo()
    assert seen() == {}


def test_entries_that_do_not_fit_together_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda-13.0").mkdir()
    (tmp_path / "cuda").symlink_to("cuda-13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    found = []
    for libc in ("glibc 2.36", "glibc 2.39"):
        monkeypatch.setattr(os, "confstr", lambda _, libc=libc: libc)
        kernels.use()
        found.append(seen())
    old, new = found
    assert old["TRITON_CACHE_DIR"].endswith("-glibc-2.36")
    assert new["TRITON_CACHE_DIR"].endswith("-glibc-2.39")
    assert new["FLASHINFER_WORKSPACE_BASE"].endswith("-glibc-2.39-cuda-13.0")
    assert old["DG_JIT_CACHE_DIR"] == new["DG_JIT_CACHE_DIR"], "device code only"


# --- what the user and a parent process have set


@pytest.mark.parametrize("value", ["/theirs", ""])
@pytest.mark.parametrize("name", [*sorted(VARIABLES), "TRITON_HOME"])
def test_what_the_user_set_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    variable = "TRITON_CACHE_DIR" if name == "TRITON_HOME" else name
    before = seen()
    undo = kernels.use()
    assert os.environ[name] == value
    assert seen().keys() - before.keys() == ALL - {variable}
    undo()
    assert seen() == before


@pytest.mark.parametrize(
    ("names", "value", "made"),
    [(VARIABLES, "/theirs", False), *((("VLLM_DISABLE_COMPILE_CACHE",), v, v != "1") for v in ("1", "0", ""))],
)
def test_nothing_is_made_when_the_user_chose_all_places_or_wants_none(
    store: Path, names: tuple[str, ...], value: str, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        monkeypatch.setenv(name, value)
    kernels.use()
    assert (kernels.MARK in os.environ, store.exists()) == (made, made)


def test_a_child_knows_that_its_parent_set_them_and_follows_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.use()
    inherited = seen()
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "other"))
    undo = kernels.use()
    assert all(seen()[name].startswith(str(tmp_path / "other")) for name in VARIABLES)
    undo()
    assert seen() == inherited, "as the child found it"
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    for change in (kernels.use, kernels.leave):  # where the plugin is off, it leaves
        undo = change()
        assert seen() == {}
        undo()
        assert seen() == inherited


def test_what_was_set_since_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    undo = kernels.use()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/theirs")
    kernels.use()  # as a child does
    assert os.environ["TRITON_CACHE_DIR"] == "/theirs"
    assert "TRITON" not in os.environ[kernels.MARK]
    kernels.leave()
    assert seen() == {"TRITON_CACHE_DIR": "/theirs"}
    undo()
    assert seen() == {"TRITON_CACHE_DIR": "/theirs"}


@pytest.mark.parametrize(
    ("variable", "used"),
    [
        ("FLASHINFER_WORKSPACE_BASE", ".cache/flashinfer/0.7.0/90a/cached_ops/sampling"),
        ("FLASHINFER_WORKSPACE_BASE", ".cache/flashinfer/cubins/some"),
        ("DG_JIT_CACHE_DIR", ".cache/vllm/deep_gemm/cache/kernel.x"),
        ("TILELANG_CACHE_DIR", ".tilelang/cache/0.1.12/linux-x86_64/kernels/12ab"),
        ("HUMMING_CACHE_DIR", ".humming/cache/12ab"),
    ],
)
def test_a_cache_that_was_filled_at_its_usual_place_stays_there(variable: str, used: str, tmp_path: Path) -> None:
    (tmp_path / "home" / used).mkdir(parents=True)
    kernels.use()
    assert VARIABLES - seen().keys() == {variable}
    (tmp_path / "home").rename(tmp_path / "away")
    kernels.use()
    (tmp_path / "away").rename(tmp_path / "home")
    kernels.use()
    assert seen().keys() == ALL, "one in the store is kept when its usual place is filled later"


# --- places that cannot be trusted or used


def of_others(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(store, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def link(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.parent / "elsewhere").mkdir()
    (store / "v1").mkdir(mode=0o700, parents=True)
    (store / "v1/jit").symlink_to(store.parent / "elsewhere")


def unreadable(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exists(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)


# What is done before, and what the line names.
REFUSED: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Any], tuple[str, ...]]] = {
    "of another user": (of_others, ("chown", "VLLM_COMPILE_STORE")),
    "a link": (link, ("v1/jit is not a folder",)),
    "cannot be made": (
        lambda _, patch: patch.setenv("VLLM_COMPILE_STORE", "/proc/none/store"),
        ("/proc/none", "name another folder in VLLM_COMPILE_STORE"),
    ),
    # A read-only mount; root is let into all else.
    "cannot be written": (lambda _, patch: patch.setattr(os, "access", lambda *_, **__: False), ("cannot be written",)),
    "cannot be looked at": (unreadable, ("Permission denied; name another folder in VLLM_COMPILE_STORE",)),
    "no room": (lambda _, patch: patch.setattr(kernels, "FREE", 2**70), ("MiB free",)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_place_that_cannot_be_trusted_or_used_is_left_alone_with_a_line(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    prepare, named = REFUSED[reason]
    prepare(store, monkeypatch)
    kernels.use()
    assert seen() == {}
    (record,) = caplog.records
    assert (record.levelname, "\n" in record.getMessage()) == ("WARNING", False)
    assert all(word in record.getMessage() for word in named)


@pytest.mark.parametrize("level", ["v1", "v1/jit", "v1/jit/triton"])
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(
    store: Path, level: str, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.use()  # as a parent did
    (store / level).chmod(mode)
    kernels.use()
    assert seen() == {}
    assert f"chmod -R go-w {store}" in caplog.text
    assert f"{store / level} can be written by other users (mode {mode:04o}" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_kernels_are_not_kept_where_others_can_move_the_store(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The root of an emptyDir: what the store opens stays open, but libraries look for their kernels by name."""
    volume = store.parent
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "none", volume]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        kernels.use()
        assert seen() == {}
        assert f"{volume} can be written by other users, who could put others in their place" in caplog.text
        Store.open(store)
        volume.chmod(0o1777)
        kernels.use()
        assert seen().keys() == ALL
    finally:
        subprocess.run(["umount", "-l", volume], check=True)


def test_users_of_a_shared_store_have_folders_of_their_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_STORE_GROUP", "1")
    store.mkdir()
    os.chown(store, -1, os.getegid())
    store.chmod(0o2770)
    kernels.use()
    mine = store / "v1" / f"jit-{os.geteuid()}"
    assert kernels.folder() == mine
    assert os.environ["TRITON_CACHE_DIR"].startswith(f"{mine}/triton/")
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_dir()


@pytest.mark.parametrize(
    ("variable", "value", "place"),
    [
        ("VLLM_COMPILE_STORE", "", "home/.cache/vllm/compile_store"),
        ("VLLM_CACHE_ROOT", "~/root", "home/root/compile_store"),
        ("VLLM_COMPILE_STORE", "~/store", "home/store"),
        ("VLLM_COMPILE_STORE", "store", Path.cwd() / "store"),
    ],
)
def test_where_the_store_is(
    variable: str, value: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_COMPILE_STORE")
    monkeypatch.setenv(variable, value)
    assert settings.store() == tmp_path / place


def test_only_the_standard_library_is_imported(store: Path) -> None:
    code = """
        before = set(sys.modules)
        from vllm_compile_ext.store import kernels
        kernels.use()
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        report(sorted(name for name in new if name not in sys.stdlib_module_names))
    """
    outcome = run(code, VLLM_COMPILE_STORE=str(store))
    assert outcome.value == ["vllm_compile_ext"], outcome.output


# --- what goes


PLACES = {
    "triton": "triton/host/HASH",
    "flashinfer": "flashinfer/host/.cache/flashinfer/0.7.0/90a/cached_ops/sampling",
    "deep_gemm": "deep_gemm/cache/kernel.gemm.12ab",
    "tilelang": "tilelang/host/0.1.12/linux-x86_64/kernels/12ab",
    "humming": "humming/host/12ab",
}


def make(folder: Path, place: str, hours: float) -> Path:
    """A kernel whose two files hold 100 bytes each and were last written and read `hours` ago."""
    at = time.time() - hours * 3600
    for name in ("kernel.cubin", "deep/kernel.json"):
        path = folder / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
        for each in (path, path.parent, folder / place):
            os.utime(each, (at, at))
    os.utime(folder / place, (at, at))
    return folder / place


def test_a_kernel_of_every_library_is_found_and_removed_whole(tmp_path: Path) -> None:
    assert list(PLACES) == [cache.name for cache in kernels.CACHES]
    made = [make(tmp_path, place, 100) for place in PLACES.values()]
    other = tmp_path / "flashinfer/host/.cache/flashinfer/0.7.0/90a/flashinfer_jit.log"
    other.write_bytes(b"x" * 7)
    assert sorted(kernel.path for kernel in kernels.find(tmp_path)) == sorted(made)
    assert kernels.size(tmp_path) == 200 * len(made) + 7
    make(tmp_path, ".leaving-1234", 100)  # by a removal that was interrupted
    gone = kernels.trim(tmp_path, max_bytes=0)
    assert sorted(kernel.path for kernel in gone) == sorted([*made, tmp_path / ".leaving-1234"])
    assert all(kernel.size == 200 for kernel in gone)
    assert kernels.size(tmp_path) == 7
    assert kernels.find(tmp_path) == []


THREE = {"new": 30, "old": 50, "middle": 40}
LATE = {"now": 0, "yesterday": 24.5}  # relatime: perhaps read a moment ago
STRANGE = {"old": 100, "new": 30, "of the future": -1000}


@pytest.mark.parametrize(
    ("hours", "limits", "gone"),
    [
        (THREE, {"max_bytes": 600}, []),
        (THREE, {"max_bytes": 450}, ["old"]),
        (THREE, {"max_bytes": 200}, ["old", "middle"]),
        (LATE, {"max_bytes": 0, "max_age": 0}, []),
        (STRANGE, {}, []),
        (STRANGE, {"max_age": 50 * 3600}, ["old"]),
        (STRANGE, {"max_bytes": 0, "max_age": 0}, ["old", "new"]),
    ],
)
def test_the_longest_unused_go_first(
    tmp_path: Path, hours: dict[str, float], limits: dict[str, Any], gone: list[str]
) -> None:
    for name, ago in hours.items():
        make(tmp_path, f"triton/host/{name}", ago)
    assert [kernel.path.name for kernel in kernels.trim(tmp_path, **limits)] == gone
    assert {path.name for path in (tmp_path / "triton/host").iterdir()} == hours.keys() - gone


def test_a_read_counts_as_a_use(tmp_path: Path) -> None:
    read = make(tmp_path, "triton/host/read", 500) / "kernel.cubin"
    make(tmp_path, "triton/host/unread", 400)
    os.utime(read, (time.time() - 30 * 3600, read.stat().st_mtime))
    assert [k.path.name for k in kernels.find(tmp_path)] == ["unread", "read"]


def test_without_times_of_access_nothing_goes_soon_after_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "triton/host/old", 100)
    (tmp_path / kernels.STAMP).touch()
    real = os.statvfs(tmp_path)
    noatime = os.statvfs_result([*real[:8], real.f_flag | os.ST_NOATIME, real.f_namemax])
    monkeypatch.setattr(os, "statvfs", lambda _: noatime)
    assert kernels.trim(tmp_path, max_bytes=0) == []
    os.utime(tmp_path / kernels.STAMP, (0, time.time() - 2 * 3600))
    assert len(kernels.trim(tmp_path, max_bytes=0)) == 1


def test_links_are_neither_followed_nor_removed(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", "kernel", 100)
    (tmp_path / "jit/triton/host").mkdir(parents=True)
    (tmp_path / "jit/triton/host/link").symlink_to(outside)
    assert kernels.trim(tmp_path / "jit", max_bytes=0) == []
    assert kernels.size(outside) == 200
    missing = tmp_path / "missing"
    assert (kernels.size(missing), kernels.find(missing), kernels.trim(missing, max_bytes=0)) == (0, [], [])
