"""Kernels that Triton and other libraries compile while serving starts: where they lie, what goes, how they travel.

Each library keeps its kernels in a folder that an environment variable names, by default in the home folder, which a
container loses.  Triton's moves: the first kernel that Inductor compiles in a process sets ``TRITON_CACHE_DIR``, where
it is unset, to a folder of that model, and the sampler's kernels, compiled later, go there too (torch 2.13.0,
`CachingAutotuner.__init__` in `_inductor/runtime/triton_heuristics.py`).  A warm start sets nothing, and looks in the
home folder.  A variable that is set is respected by Inductor, by vLLM and by Triton, which reads it for each kernel.

So `use` names ``<store>/v1/jit/<name>/...``.  What lies there is run, so it is made owner-only, and left alone where
others can write.  A library names what it makes by a digest of what it was made from; here, whole kernels are only
counted, removed, and carried to another store.  What is missing is compiled again.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vllm_compile_ext import settings
from vllm_compile_ext.replace import Undo
from vllm_compile_ext.store.files import Tree, UnsafeStoreError, is_plain_path, is_writable

logger = logging.getLogger(__name__)

# Says to child processes, which inherit the variables, that they were not set by the user: lines "NAME=value".
MARK = "_VLLM_COMPILE_EXT_JIT_CACHES"
# Bytes that have to be free: a library whose cache runs full raises where the kernel was to run.
FREE = 256 * 2**20


def _host() -> tuple[str, ...]:
    """What host code depends on that is compiled here: processor, Python, C library."""
    return (os.uname().machine, str(sys.implementation.cache_tag), *platform.libc_ver())


def _toolkit() -> tuple[str, ...]:
    """`_host`, and the CUDA toolkit that compiles and is linked: the real name of its folder, such as "cuda-13.0"."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return (*_host(), Path(named).resolve().name)


@dataclass(frozen=True)
class Cache:
    """One library's cache.

    name: its folder below ``v1/jit``.  kernels: pattern of the paths below it that are one kernel's folder each.
    variable: names its folder; a user who sets it, or one of `also`, has chosen.
    apart: what makes entries incompatible and is not in the library's own key; the parts of a folder's name.
    filled: patterns of paths that exist where the cache has been used at its usual place.  It stays there then: these
        take minutes to fill, may have been put into an image on purpose, and need a compiler that may be missing now.
    """

    name: str
    kernels: str
    variable: str
    also: tuple[str, ...] = ()
    apart: Callable[[], tuple[str, ...]] = _host
    filled: tuple[str, ...] = ()


# The caches on disk that the warm-up of vLLM 0.32.0 fills, laid out as by Triton 3.7.1, FlashInfer 0.7.0, DeepGEMM as
# vLLM has it, TileLang 0.1.12 and Humming 0.1.17.  The first `*` of most is `apart`.  Not here: CuTe DSL (vLLM's
# `cute.compile` keeps kernels in memory), QuACK (vLLM takes no kernels from it), the driver's CUDA_CACHE_PATH (PTX of
# wheels older than the GPU; the driver bounds it), and FlashInfer's autotuning, which vLLM keeps as JSON.
CACHES = (
    # Sampler, attention, LoRA, MoE, input preparation.  Kernels are keyed by all that they are made from; the launchers
    # around them are C, keyed by their source and the processor (3.7.1, `runtime/build.py`).
    Cache("triton", "*/*", "TRITON_CACHE_DIR", also=("TRITON_HOME",)),
    # Top-k and top-p sampling and attention, where the package flashinfer-jit-cache does not have them.  Keyed by
    # FlashInfer's version and the GPU; read when flashinfer is imported (0.7.0, `jit/env.py`).
    Cache(
        "flashinfer",
        "*/.cache/flashinfer/*/*/cached_ops/*",
        "FLASHINFER_WORKSPACE_BASE",
        apart=_toolkit,
        filled=("~/.cache/flashinfer/*/*/cached_ops/*", "~/.cache/flashinfer/cubins/*"),
    ),
    # FP8 matrix products, `model_executor/warmup/deep_gemm_warmup.py`; vLLM sets the variable to a folder in its cache
    # root where it is unset (`utils/deep_gemm.py`).  Device code only, keyed by compiler, flags and source.
    Cache("deep_gemm", "cache/*", "DG_JIT_CACHE_DIR", apart=tuple, filled=("{cache_root}/deep_gemm/cache/*",)),
    # `model_executor/warmup/jit_warmup_tilelang_helper.py`.  Host libraries, keyed by TileLang's version, processor,
    # target and source.
    Cache(
        "tilelang",
        "*/*/*/kernels/*",
        "TILELANG_CACHE_DIR",
        apart=_toolkit,
        filled=("~/.tilelang/cache/*/*/kernels/*",),
    ),
    # Weight-only quantized matrix products, compiled in the first forward pass.
    Cache("humming", "*/*", "HUMMING_CACHE_DIR", filled=("~/.humming/cache/*",)),
)


# --- where they lie


def folder() -> Path:
    """The folder below which the caches lie; `find`, `size` and `trim` take it."""
    return Tree(settings.store()).jit


def leave() -> Undo:
    """Take away the variables that a parent process set; returns the undo."""
    inherited = _inherited()
    for name in inherited:
        del os.environ[name]

    def undo() -> None:
        for name, value in inherited.items():
            os.environ.setdefault(name, value)

    return undo


def use() -> Undo:
    """Set the variables that the user did not set; returns the undo, which leaves alone what was changed since."""
    undo_leave = leave()
    try:
        ours = _usable_places()
    except BaseException:
        undo_leave()
        raise
    if ours:
        ours[MARK] = "\n".join(f"{name}={value}" for name, value in ours.items())
    os.environ.update(ours)

    def undo() -> None:
        for name, value in ours.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        undo_leave()

    return undo


def _inherited() -> dict[str, str]:
    """What a parent process set and nobody has changed since, and the mark."""
    mark = os.environ.get(MARK)
    if mark is None:
        return {}
    pairs = [line.partition("=") for line in mark.splitlines()]
    return {name: value for name, _, value in pairs if os.environ.get(name) == value} | {MARK: mark}


def _usable_places() -> dict[str, str]:
    """The variables to set; none when the user wants no store or its folder cannot be used, which a line says."""
    if settings.store_off():
        return {}
    try:
        tree = Tree(settings.store())
        places = _places(tree.jit)
        for place in places.values():
            with tree.folder(*place.relative_to(tree.path).parts, make=True, private=True) as handle:
                if not is_writable(handle):
                    raise UnsafeStoreError(f"{place} cannot be written; name another folder in VLLM_COMPILE_STORE")
            if tree.movable is not None:  # the libraries look for their kernels by name
                raise UnsafeStoreError(
                    f"{tree.movable} can be written by other users, who could put others in their place; to keep them, "
                    "name a folder elsewhere in VLLM_COMPILE_STORE"
                )
        if places:
            with tree.folder(tree.jit.name) as handle:
                if tree.group is None:
                    os.fchmod(handle, 0o700)  # below it libraries make folders by the umask
            if (free := shutil.disk_usage(tree.jit).free) < FREE:
                raise UnsafeStoreError(
                    f"{tree.jit} has {free >> 20} MiB free, and kernels may need {FREE >> 20}; free space, or name "
                    "another folder in VLLM_COMPILE_STORE"
                )
            (tree.jit / STAMP).touch(mode=0o600)
    except (UnsafeStoreError, OSError) as error:
        why = str(error)
        if isinstance(error, OSError):
            why = f"{error.filename}: {error.strerror}; name another folder in VLLM_COMPILE_STORE"
        logger.warning("compiled kernels of Triton and others are kept where stock vLLM keeps them: %s", why)
        return {}
    return {variable: str(place) for variable, place in places.items()}


def _places(jit: Path) -> dict[str, Path]:
    """The variables that are ours to set, and the folders to name in them."""
    places = {}
    for cache in CACHES:
        place = jit.joinpath(cache.name, "-".join(cache.apart()))
        chosen = any(name in os.environ for name in (cache.variable, *cache.also))
        if not chosen and (place.exists() or not _is_filled(cache)):
            places[cache.variable] = place
    return places


def _is_filled(cache: Cache) -> bool:
    """Whether the cache has been used at its usual place."""
    root = glob.escape(str(settings.cache_root()))
    patterns = [os.path.expanduser(pattern.format(cache_root=root)) for pattern in cache.filled]  # noqa: PTH111
    return any(next(glob.iglob(pattern), None) for pattern in patterns)  # noqa: PTH207


# --- what goes

# Seconds since its last use for which a kernel stays, whatever the limits: an hour, and the day by which the time of
# access lags on a file system mounted with relatime, Linux's default.
SPARED = 25 * 3600.0
# Touched by each process that may use the kernels.  Where the file system keeps no times of access, it is all that
# tells of their use, and nothing is removed for this many seconds after it.
STAMP = ".started"
_STARTING = 3600.0
_LEAVING = ".leaving-"  # prefix of the folders that hold kernels while they are removed


@dataclass(frozen=True)
class Kernel:
    """One kernel: its folder, the size of its files in bytes, and when one of them was last read or written."""

    path: Path
    size: int
    used: float  # unix seconds


def find(folder: Path) -> list[Kernel]:
    """The kernels below `folder`, the longest unused first."""
    paths = [path for cache in CACHES for path in (folder / cache.name).glob(cache.kernels)]
    paths += folder.glob(f"{_LEAVING}*")  # left by a removal that was interrupted
    found = [_kernel(path) for path in paths if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda kernel: kernel.used)


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(status.st_size for status in _files(folder))


def trim(folder: Path, max_bytes: int | None = None, max_age: float | None = None) -> list[Kernel]:
    """Remove kernels unused for `max_age` seconds, then the longest unused until `max_bytes` are left in `folder`.

    None is no limit.  Nothing used within the last `SPARED` seconds is removed, even if the limits are not met then.
    Returns what was removed; what cannot be removed is left.
    """
    gone: list[Kernel] = []
    now, total, stamp = time.time(), size(folder), folder / STAMP
    if stamp.exists() and os.statvfs(folder).f_flag & os.ST_NOATIME and now - stamp.stat().st_mtime < _STARTING:
        return gone
    for kernel in find(folder):
        age = max(0.0, now - kernel.used)  # a clock that was set back makes everything new
        too_old = max_age is not None and age > max_age
        too_much = max_bytes is not None and total > max_bytes
        if age > SPARED and (too_old or too_much) and _remove(kernel.path, folder):
            total -= kernel.size
            gone.append(kernel)
    return gone


def _files(folder: Path) -> Iterator[os.stat_result]:
    """Status of each file below `folder`; what vanishes meanwhile is left out, links are not followed."""
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                yield (Path(at) / name).lstat()


def _kernel(path: Path) -> Kernel:
    files = list(_files(path))
    used = [max(status.st_mtime, status.st_atime) for status in files]
    with suppress(OSError):
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


# --- how they travel

_DEEPEST = 16  # steps of a kernel file's path in a bundle
_TRITON_WRITES = "tmp.pid_"  # how the folders begin in which Triton writes


def check_path(path: str) -> None:
    """Raises `ValueError` unless `path` is relative, no deeper than a kernel's, and stays below its folder."""
    steps = path.split("/")
    # Steps of over 255 bytes, and paths of over 4095, are none to Linux.
    fits = is_plain_path(path) and len(steps) <= _DEEPEST and len(path.encode()) <= 1000
    if not fits or max(len(step.encode()) for step in steps) > 255:
        raise ValueError(f"{path[:300]!r} is not allowed: a printable relative path of up to 1000 bytes is")


def paths(folder: Path) -> Iterator[str]:
    """The paths of all files of kernels below `folder`, relative to it, in a fixed order; links are left out."""
    for place, below, names in os.walk(folder):
        top = Path(place) == folder  # where a hidden name is that of a mark or of something that is being removed
        below[:] = sorted(n for n in below if not (n.startswith(_TRITON_WRITES) or (top and n.startswith("."))))
        for found in sorted(Path(place, name) for name in names):
            path = found.relative_to(folder).as_posix()
            with suppress(ValueError):
                check_path(f"v1/jit/{path}")
                if not top and found.is_file() and not found.is_symlink():
                    yield path


def relocated(path: str, data: bytes, folder: Path | None) -> bytes:
    """The content `data` of the file `path` as it has to be in `folder`, or in none yet.

    Triton lists a kernel's files in a file ``__grp__<name>.json``, by absolute paths though they lie beside it, and
    takes a kernel whose listed files do not exist for one that is not there (3.7.1, `runtime/cache.py`, `get_group`).
    FlashInfer asks ninja whether a kernel is up to date, which goes by the times of its files: a bundle keeps them, and
    they have it found where the store is at the same place in the same image.
    """
    file = PurePosixPath(path).name
    if not (file.startswith("__grp__") and file.endswith(".json")):
        return data
    try:
        files = {name: PurePosixPath(name).name for name in dict(json.loads(data)["child_paths"])}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return data  # it only looks like a list of Triton's
    places = {name: str(folder / file) if folder else file for name, file in files.items()}
    return json.dumps({"child_paths": places}).encode()
