"""The caches of kernel compilers in a store's `jit` folder, as files that another machine can use.

Triton looks up a kernel's files through a file ``__grp__<name>.json``, which holds their absolute paths
(``FileCacheManager.put_group`` in triton/runtime/cache.py, 3.x): in a store at another place it would find none of
them.  They all lie beside it, so their names are enough to write it anew.
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
    """The paths of all files below `folder`, relative to it, in a fixed order; links and others are left out."""
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith(_TEMPORARY))
        for found in sorted(Path(place, name) for name in names):
            if found.is_file() and not found.is_symlink():
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
        names = {name: PurePosixPath(path).name for name, path in group["child_paths"].items()}
    except (msgspec.MsgspecError, ValueError, RecursionError, KeyError):
        return data
    return msgspec.json.encode({"child_paths": {n: str(folder / p) if folder else p for n, p in names.items()}})
