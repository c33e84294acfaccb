"""Kernels that other libraries' JIT compilers keep below one folder: their size, eviction, and how they travel.

The folder has one folder for each library.  A library writes and reads there on its own and names what it makes by a
digest of what it was made from; here, whole kernels are only counted, removed, and carried to another store.  What is
missing is compiled again.

Triton lists a kernel's files in a file ``__grp__<name>.json``, by absolute paths though they lie beside it, and takes a
kernel whose listed files do not exist for one that is not there (3.7.1, `runtime/cache.py`, `get_group`): the list is
written anew where it is unpacked.  FlashInfer asks ninja whether a kernel is up to date, which goes by the times of its
files: they are kept, and have it found where the store is at the same place in the same image.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Where one kernel's folder lies below its library's: Triton 3.7.1, FlashInfer 0.7.0, DeepGEMM as vLLM 0.32.0 has it,
# TileLang 0.1.12, Humming 0.1.17.  The first `*` of most is `vllm_compile_ext.jit_caches`' own.
LAYOUT = {
    "triton": "*/*",
    "flashinfer": "*/.cache/flashinfer/*/*/cached_ops/*",
    "deep_gemm": "cache/*",
    "tilelang": "*/*/*/kernels/*",
    "humming": "*/*",
}
# Seconds since its last use for which a kernel stays, whatever the limits: an hour, and the day by which the time of
# access lags on a file system mounted with relatime, Linux's default.
SPARED = 25 * 3600.0
# Touched by each process that may use the kernels.  Where the file system keeps no times of access, it is all that
# tells of their use, and nothing is removed for this many seconds after it.
STAMP = ".started"
_STARTING = 3600.0
_LEAVING = ".leaving-"
_DEEPEST = 16  # steps of a kernel file's path in a bundle
_TRITON_WRITES = "tmp.pid_"  # how the folders begin in which Triton writes


@dataclass(frozen=True)
class Kernel:
    """One kernel: its folder, the size of its files in bytes, and when one of them was last read or written."""

    path: Path
    size: int
    used: float  # unix seconds


def find(folder: Path) -> list[Kernel]:
    """The kernels below `folder`, the longest unused first."""
    paths = [path for name, pattern in LAYOUT.items() for path in (folder / name).glob(pattern)]
    left = folder.glob(f"{_LEAVING}*")  # by a removal that was interrupted
    return sorted((_kernel(path) for path in (*left, *paths) if _is_folder(path)), key=lambda kernel: kernel.used)


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(status.st_size for status in _files(folder))


def trim(
    folder: Path, max_bytes: int | None = None, max_age: float | None = None, spared: float = SPARED
) -> list[Kernel]:
    """Remove kernels unused for `max_age` seconds, then the longest unused until `max_bytes` are left in `folder`.

    None is no limit.  Nothing used within the last `spared` seconds is removed, even if the limits are not met then.
    Returns what was removed; what cannot be removed is left.
    """
    gone: list[Kernel] = []
    if not folder.is_dir() or _may_be_starting(folder):
        return gone
    now, total = time.time(), size(folder)
    for kernel in find(folder):
        age = max(0.0, now - kernel.used)  # a clock that was set back makes everything new
        too_old = max_age is not None and age > max_age
        too_much = max_bytes is not None and total > max_bytes
        if age > spared and (too_old or too_much) and _remove(kernel.path, folder):
            total -= kernel.size
            gone.append(kernel)
    return gone


def _may_be_starting(folder: Path) -> bool:
    """Whether a process may be about to use kernels of which no time of access tells."""
    if not os.statvfs(folder).f_flag & os.ST_NOATIME:
        return False
    try:
        return time.time() - (folder / STAMP).stat().st_mtime < _STARTING
    except FileNotFoundError:
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _files(folder: Path) -> Iterator[os.stat_result]:
    """Status of each file below `folder`; what vanishes meanwhile is left out, links are not followed."""
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                yield (Path(at) / name).lstat()


def _kernel(path: Path) -> Kernel:
    files = list(_files(path))
    used = [max(status.st_mtime, status.st_atime) for status in files]
    with contextlib.suppress(OSError):
        used.append(path.stat().st_mtime)
    return Kernel(path, sum(status.st_size for status in files), max(used, default=0.0))


def _remove(path: Path, folder: Path) -> bool:
    """Remove a kernel at once for whoever looks for it, then its files."""
    leaving = path if path.name.startswith(_LEAVING) else folder / f"{_LEAVING}{os.urandom(8).hex()}"
    try:
        path.rename(leaving)
    except OSError:
        return False
    shutil.rmtree(leaving, ignore_errors=True)
    return True


class PathError(ValueError):
    """A path that leads out of its folder, or that no file can have."""


def check_path(path: str) -> None:
    """Raises `PathError` unless `path` is relative, no deeper than a kernel's, and stays below its folder."""
    steps = path.split("/")
    plain = path.isprintable() and "\\" not in path and not {"", ".", ".."}.intersection(steps)
    # Steps of over 255 bytes, and paths of over 4095, are none to Linux.
    if (
        not plain
        or len(steps) > _DEEPEST
        or len(path.encode()) > 1000
        or max(len(step.encode()) for step in steps) > 255
    ):
        raise PathError(f"{path[:300]!r} is not allowed: a printable relative path of up to 1000 bytes is")


def paths(folder: Path) -> Iterator[str]:
    """The paths of all files of kernels below `folder`, relative to it, in a fixed order; links are left out."""
    for place, below, names in os.walk(folder):
        top = Path(place) == folder  # where a hidden name is that of a mark or of something that is being removed
        below[:] = sorted(n for n in below if not (n.startswith(_TRITON_WRITES) or (top and n.startswith("."))))
        for found in sorted(Path(place, name) for name in names):
            path = found.relative_to(folder).as_posix()
            with contextlib.suppress(PathError):
                check_path(f"v1/jit/{path}")
                if not top and found.is_file() and not found.is_symlink():
                    yield path


def placed(path: str, data: bytes, folder: Path | None) -> bytes:
    """The content of the file `path` as it has to be in `folder`, or in none yet."""
    file = PurePosixPath(path).name
    if not (file.startswith("__grp__") and file.endswith(".json")):
        return data
    try:
        files = {name: PurePosixPath(name).name for name in dict(json.loads(data)["child_paths"])}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return data  # it only looks like a list of Triton's
    places = {name: str(folder / file) if folder else file for name, file in files.items()}
    return json.dumps({"child_paths": places}).encode()
