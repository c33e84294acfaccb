"""Who uses what: flock on files of the store.  The kernel gives a lock back when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_compile_ext.artifacts.files import SAFE

_POLL = 0.05  # seconds between two attempts
_LOOK = 0.2  # seconds that `hold` waits for one that only looks whether the file is held

_held: set[tuple[int, int]] = set()  # device and inode of what `hold` locked in this process


def hold(path: Path) -> None:
    """Mark the file `path` as used now, and as in use until this process and those it forks have ended.

    Raises `OSError`; so does an attempt while the file is being removed.
    """
    handle = os.open(path, os.O_RDONLY | SAFE)
    kept = False
    try:
        found = os.fstat(handle)
        if (found.st_dev, found.st_ino) not in _held:
            if not _acquire(handle, fcntl.LOCK_SH, time.monotonic() + _LOOK):
                raise BlockingIOError(f"{path} is being removed")
            _held.add((found.st_dev, found.st_ino))
            kept = True
        os.utime(handle)
    finally:
        if not kept:
            os.close(handle)


def in_use(path: Path) -> bool:
    """Whether a process holds the file `path`; False also where that cannot be found out."""
    try:
        handle = os.open(path, os.O_RDONLY | SAFE)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def remove(path: Path) -> bool:
    """Remove the file `path` unless someone holds it, and say whether it is gone."""
    try:
        handle = os.open(path, os.O_RDWR | SAFE)
    except OSError:
        handle = None  # a link, or already gone: nothing that could be held
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


@contextmanager
def locked(path: Path, *, exclusive: bool, timeout: float) -> Iterator[bool]:
    """Lock the file `path`, alone or shared; False when that takes longer than `timeout` seconds.

    Raises `OSError` when the file cannot be made or its file system knows no locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | SAFE, 0o600)
    try:
        yield _acquire(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, time.monotonic() + timeout)
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file open too
        os.close(handle)


def _acquire(handle: int, operation: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, operation | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_POLL)
