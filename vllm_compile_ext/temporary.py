"""Temporary folders that belong to a process: gone with it, or, when it was killed, with the next start.

The kernel gives a lock back when its process ends, however it ends: a folder whose lock can be had is nobody's.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_PROBE = bytes(1 << 16)  # has to fit: a full disk can make a folder, and nothing in it
_LOCK = "in use"

# Names the run's folder to the engine and the workers.  Not VLLM_*: vLLM warns of such names that it does not know.
RUN = "_VLLM_COMPILE_EXT_RUN"
RUN_PREFIX = "vllm-compile-ext-run-"

SCRATCH = "compile_scratch"  # the folder in vLLM's cache root
SCRATCH_PREFIX = "vllm-compile-"
_PLAIN = re.compile(r"[\w./+@:,=-]+")


class Folder:
    """A new folder below `root`, owner-only, in use until `remove` or the end of this process and those it forks.

    Folders that killed processes left there are removed first.  Raises `OSError` where none can be made, or nothing be
    written in it.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        remove_abandoned(root, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        self._process = os.getpid()
        self._lock: int | None = None
        try:
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / "probe").write_bytes(_PROBE)
            (self.path / "probe").unlink()
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the folder, now and once; a forked child that calls this removes nothing."""
        if os.getpid() != self._process:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def remove_abandoned(root: Path, prefix: str) -> None:
    """Remove the folders below `root` of processes that are gone."""
    for path in root.glob(f"{prefix}*"):
        try:
            handle = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # being made, being removed, or another user's
        with contextlib.suppress(OSError):  # in use
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def run_folder() -> Path | None:
    """The folder in which the processes of this vLLM count while it runs, or None; it may be gone by now."""
    name = os.environ.get(RUN)
    return Path(name) if name else None


def make_run_folder() -> Callable[[], None]:
    """Make that folder, unless this process was started by one that did; returns the undo.  A failure costs a line."""
    before = os.environ.get(RUN)
    # A child by Python's `multiprocessing`, which starts the engine, the workers and more API servers.  A program that
    # another vLLM runs, such as a second server, inherits the variable and is no part of it.
    multiprocessing = sys.modules.get("multiprocessing.process")
    is_child = multiprocessing is not None and multiprocessing.parent_process() is not None
    if is_child and before and Path(before).is_dir():
        return lambda: None
    try:
        made = Folder(Path(tempfile.gettempdir()), RUN_PREFIX)
    except OSError as error:
        logger.warning("no metrics of this start: no temporary folder (%s)", error)
        os.environ.pop(RUN, None)
        return lambda: None
    os.environ[RUN] = str(made.path)
    atexit.register(made.remove)

    def undo() -> None:
        made.remove()
        atexit.unregister(made.remove)
        if os.environ.get(RUN) != str(made.path):
            return
        del os.environ[RUN]
        if before is not None:
            os.environ[RUN] = before

    return undo


@functools.cache
def scratch() -> Path:
    """The folder that this process compiles in, made on the first call; it goes with the process.

    Upstream keeps Inductor's files for all starts: a compiler that was killed leaves half a kernel there, and the next
    start maps it.  What is worth keeping is in the store.
    It is below vLLM's cache root, or below the system's temporary folder; that also where the root's name has spaces or
    the like: Inductor does not quote it for its compiler (torch 2.13.0, `_inductor/cpp_builder.py`).
    """
    import vllm.envs

    elsewhere = Path(tempfile.gettempdir())
    root = Path(vllm.envs.VLLM_CACHE_ROOT) / SCRATCH
    if not _PLAIN.fullmatch(str(root)):
        root = elsewhere
    try:
        root.mkdir(parents=True, exist_ok=True)
        made = Folder(root, SCRATCH_PREFIX)
    except OSError as error:
        made = Folder(elsewhere, SCRATCH_PREFIX)
        logger.warning("compiling in %s: %s cannot be written (%s)", made.path, root, error.strerror)
    atexit.register(made.remove)
    return made.path
