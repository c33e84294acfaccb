"""The kernels in a store's `jit` folder (see `kernels`) as files that another store can take.

Triton lists a kernel's files in a file ``__grp__<name>.json``, by absolute paths though they lie beside it, and takes a
kernel whose listed files do not exist for one that is not there (3.7.1, `runtime/cache.py`, `get_group`): the list is
written anew where it is unpacked.  FlashInfer asks ninja whether a kernel is up to date, which goes by the times of its
files: they are kept, and have it found where the store is at the same place in the same image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

from vllm_compile_ext.artifacts import files
from vllm_compile_ext.artifacts.manifest import ManifestError

_TEMPORARY = "tmp.pid_"  # how the folders begin in which Triton writes


def check_path(path: str) -> None:
    """Raises `ManifestError` unless `path` is relative and stays below the folder that it is put in."""
    steps = path.split("/")
    plain = path.isprintable() and "\\" not in path and not {"", ".", ".."}.intersection(steps)
    # Steps of over 255 bytes, and paths of over 4095, are none to Linux.
    if not plain or len(path.encode()) > 1000 or max(len(step.encode()) for step in steps) > 255:
        raise ManifestError(f"{path[:300]!r} is not allowed: a printable relative path of up to 1000 bytes is")


def paths(folder: Path) -> Iterator[str]:
    """The paths of all files of kernels below `folder`, relative to it, in a fixed order; links are left out."""
    for place, below, names in os.walk(folder):
        top = Path(place) == folder  # where a hidden name is that of a mark or of something that is being removed
        below[:] = sorted(n for n in below if not (n.startswith(_TEMPORARY) or (top and n.startswith("."))))
        for found in sorted(Path(place, name) for name in names):
            if not top and found.is_file() and not found.is_symlink():
                path = found.relative_to(folder).as_posix()
                check_path(path)
                yield path


def read(folder: Path, path: str) -> bytes:
    """The file without the place of its store.  Raises `files.DamagedError` when it cannot be read."""
    data = files.read(folder / path)
    return placed(data, None) if is_group(path) else data


def is_group(path: str) -> bool:
    """Whether the file holds paths of others."""
    name = PurePosixPath(path).name
    return name.startswith("__grp__") and name.endswith(".json")


def placed(data: bytes, folder: Path | None) -> bytes:
    """The content of a group's file that will lie in `folder`, or in none yet.  One that is no such file is kept."""
    try:
        group = msgspec.json.decode(data, type=dict[str, dict[str, str]])
        names = {name: PurePosixPath(name).name for name in group["child_paths"]}
    except (msgspec.MsgspecError, ValueError, RecursionError, KeyError):
        return data
    return msgspec.json.encode({"child_paths": {n: str(folder / p) if folder else p for n, p in names.items()}})
