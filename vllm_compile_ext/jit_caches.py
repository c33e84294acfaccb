"""One place under the store for the kernels that Triton and other libraries compile while serving starts.

Each library keeps its kernels in a folder that an environment variable names.  Left alone, these folders lie in the
home folder, which a container loses, and Triton's is a moving one: the first kernel that Inductor compiles in a process
sets ``TRITON_CACHE_DIR``, where it is unset, to a folder of that model, and whatever Triton compiles later in that
process, the sampler's kernels too, goes there (torch 2.13.0, `CachingAutotuner.__init__` in
`_inductor/runtime/triton_heuristics.py`).  A warm start unpickles Inductor's kernels, sets nothing, and looks in the
home folder.  A variable that is set is respected by Inductor, by vLLM and by Triton, which reads it for each kernel.
Inductor's own kernels lie there as well then; its artifacts carry them, and put back what is missing.

The folder is ``<store>/v1/jit/<name>/...``.  What lies there is run, so it is made owner-only, and left alone where
others can write.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_compile_ext import settings
from vllm_compile_ext.store import kernels
from vllm_compile_ext.store.files import Tree, UnsafeStoreError, is_writable

logger = logging.getLogger(__name__)

# Says to child processes, which inherit the variables, that they were not set by the user: lines "NAME=value".
MARK = "_VLLM_COMPILE_EXT_JIT_CACHES"
# Bytes that have to be free: a library whose cache runs full raises where the kernel was to run.
FREE = 256 * 2**20


def _host() -> tuple[str, ...]:
    """What host code depends on that is compiled here: processor, Python, C library."""
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or "libc"  # "glibc 2.36"
    except ValueError:
        libc = "libc"
    return (os.uname().machine, sys.implementation.cache_tag or "python", libc.replace(" ", "-"))


def _toolkit() -> tuple[str, ...]:
    """`_host`, and the CUDA toolkit that compiles and is linked: its folder's real name, such as "cuda-13.0"."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return (*_host(), Path(named).resolve().name)


def _nothing() -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Cache:
    """One library's cache.

    name: its folder below ``v1/jit``.
    variable: names its folder; a user who sets it, or one of `also`, has chosen.
    apart: what makes entries incompatible and is not in the library's own key; the parts of a folder's name.
    filled: patterns of paths that exist where the cache has been used at its usual place.  It stays there then: these
        take minutes to fill, may have been put into an image on purpose, and need a compiler that may be missing now.
    """

    name: str
    variable: str
    also: tuple[str, ...] = ()
    apart: Callable[[], tuple[str, ...]] = _host
    filled: tuple[str, ...] = ()


# The caches on disk that the warm-up of vLLM 0.32.0 fills.  Not here: CuTe DSL (vLLM's `cute.compile` keeps kernels in
# memory), QuACK (vLLM takes helpers from it, no kernels), the driver's CUDA_CACHE_PATH (PTX of wheels older than the
# GPU; the driver bounds it), and what vLLM keeps in its cache root itself: FlashInfer's autotuning, as JSON.
CACHES = (
    # Sampler, attention, LoRA, MoE, input preparation.  Kernels are keyed by all that they are made from; the launchers
    # around them are C, keyed by their source and the processor (3.7.1, `runtime/build.py`).
    Cache("triton", "TRITON_CACHE_DIR", also=("TRITON_HOME",)),
    # Top-k and top-p sampling and attention, where the package flashinfer-jit-cache does not have them.  Keyed by
    # FlashInfer's version and the GPU; read when flashinfer is imported (0.7.0, `jit/env.py`).
    Cache(
        "flashinfer",
        "FLASHINFER_WORKSPACE_BASE",
        apart=_toolkit,
        filled=("~/.cache/flashinfer/*/*/cached_ops/*", "~/.cache/flashinfer/cubins/*"),
    ),
    # FP8 matrix products, `model_executor/warmup/deep_gemm_warmup.py`; vLLM sets the variable to a folder in its cache
    # root where it is unset (`utils/deep_gemm.py`).  Device code only, keyed by compiler, flags and source.
    Cache("deep_gemm", "DG_JIT_CACHE_DIR", apart=_nothing, filled=("{cache_root}/deep_gemm/cache/*",)),
    # `model_executor/warmup/jit_warmup_tilelang_helper.py`.  Host libraries, keyed by TileLang's version, processor,
    # target and source.
    Cache("tilelang", "TILELANG_CACHE_DIR", apart=_toolkit, filled=("~/.tilelang/cache/*/*/kernels/*",)),
    # Weight-only quantized matrix products, compiled in the first forward pass.
    Cache("humming", "HUMMING_CACHE_DIR", filled=("~/.humming/cache/*",)),
)


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder below which the caches lie; `vllm_compile_ext.store.kernels` measures and trims it."""
    return Tree(settings.store(environ)).jit


def settle(*, active: bool) -> Callable[[], None]:
    """Set the variables that the user did not set, or, not `active`, take away what a parent process set of them.

    Returns the undo: the environment as it was, except for variables that somebody else has changed since.
    """
    ours = _inherited()
    before = {name: os.environ[name] for name in (*ours, MARK) if name in os.environ}
    wanted = _wanted({k: v for k, v in os.environ.items() if k not in before}) if active else {}
    for name in before.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)
    names = before.keys() | wanted.keys()
    after = {name: os.environ.get(name) for name in names}

    def undo() -> None:
        for name in names:
            if os.environ.get(name) != after[name]:
                continue
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]

    return undo


def _inherited() -> dict[str, str]:
    """The variables that a parent process set and that nobody has changed since."""
    pairs = [line.partition("=") for line in os.environ.get(MARK, "").splitlines()]
    return {name: value for name, _, value in pairs if os.environ.get(name) == value}


def _wanted(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to set, with the mark; nothing when the user wants no store or its folder cannot be used."""
    if settings.store_off(environ):
        return {}
    try:
        tree = Tree(settings.store(environ))
        places = _places(environ, tree.jit)
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
            _check_room(tree.jit)
            (tree.jit / kernels.STAMP).touch(mode=0o600)
    except (UnsafeStoreError, OSError) as error:
        why = str(error)
        if isinstance(error, OSError):
            why = f"{error.filename}: {error.strerror}; name another folder in VLLM_COMPILE_STORE"
        logger.warning("compiled kernels of Triton and others are kept where stock vLLM keeps them: %s", why)
        return {}
    found = {variable: str(place) for variable, place in places.items()}
    return found | {MARK: "\n".join(f"{name}={value}" for name, value in found.items())} if found else {}


def _places(environ: Mapping[str, str], jit: Path) -> dict[str, Path]:
    """The variables that are ours to set, and the folders to name in them."""
    places = {}
    for cache in CACHES:
        place = jit.joinpath(cache.name, "-".join(cache.apart()))
        chosen = any(name in environ for name in (cache.variable, *cache.also))
        if not chosen and (place.exists() or not _filled(cache, environ)):
            places[cache.variable] = place
    return places


def _filled(cache: Cache, environ: Mapping[str, str]) -> bool:
    root = glob.escape(str(settings.cache_root(environ)))
    patterns = [os.path.expanduser(pattern.format(cache_root=root)) for pattern in cache.filled]  # noqa: PTH111
    return any(next(glob.iglob(pattern), None) for pattern in patterns)  # noqa: PTH207


def _check_room(place: Path) -> None:
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    if free < FREE:
        raise UnsafeStoreError(
            f"{place} has {free >> 20} MiB free, and kernels may need {FREE >> 20}; free space, or name another folder "
            "in VLLM_COMPILE_STORE"
        )
