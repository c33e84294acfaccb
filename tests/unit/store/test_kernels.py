import os
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_compile_ext.store import kernels

PLACES = {
    "triton": "triton/host/HASH",
    "flashinfer": "flashinfer/host/.cache/flashinfer/0.7.0/90a/cached_ops/sampling",
    "deep_gemm": "deep_gemm/cache/kernel.gemm.12ab",
    "tilelang": "tilelang/host/0.1.12/linux-x86_64/kernels/12ab",
    "humming": "humming/host/12ab",
}


def make(folder: Path, place: str, hours: float, files: tuple[str, ...] = ("kernel.cubin", "deep/kernel.json")) -> Path:
    """A kernel whose files hold 100 bytes each and were last written and read `hours` ago."""
    at = time.time() - hours * 3600
    for name in files:
        path = folder / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
        for each in (path, path.parent):
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
    gone = kernels.trim(tmp_path, max_bytes=0)
    assert sorted(kernel.path for kernel in gone) == sorted(made)
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
        (LATE, {"max_bytes": 0, "spared": 3600}, ["yesterday"]),
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
    read = make(tmp_path, "triton/host/read", 500)
    make(tmp_path, "triton/host/unread", 400)
    os.utime(read / "kernel.cubin", (time.time() - 30 * 3600, (read / "kernel.cubin").stat().st_mtime))
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


def test_what_an_interrupted_removal_left_goes_too(tmp_path: Path) -> None:
    make(tmp_path, ".leaving-1234", 100)
    assert len(kernels.trim(tmp_path, max_bytes=0)) == 1
    assert kernels.size(tmp_path) == 0


def test_links_are_neither_followed_nor_removed(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", "kernel", 100)
    (tmp_path / "jit/triton/host").mkdir(parents=True)
    (tmp_path / "jit/triton/host/link").symlink_to(outside)
    assert kernels.trim(tmp_path / "jit", max_bytes=0) == []
    assert kernels.size(outside) == 200
    missing = tmp_path / "missing"
    assert (kernels.size(missing), kernels.find(missing), kernels.trim(missing, max_bytes=0)) == (0, [], [])
