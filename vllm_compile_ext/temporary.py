"""Temporary folders that belong to a process: gone with it, or, when it was killed, with the next start.

The kernel gives a lock back when its process ends, however it ends: a folder whose lock can be had is nobody's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PROBE = 1 << 16  # bytes that have to fit: a full disk can make a folder, and nothing in it
_LOCK = "in use"


class Folder:
    """A new folder below `root`, owner-only, in use until `remove` or the end of this process and those it forks.

    Raises `OSError` where none can be made, or nothing be written in it.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        self._process = os.getpid()
        self._lock: int | None = None
        try:
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / "probe").write_bytes(bytes(PROBE))
            (self.path / "probe").unlink()
        except OSError:
            self.remove()
            raise

    def is_mine(self) -> bool:
        """Whether this is the process that made it, not a fork."""
        return os.getpid() == self._process

    def remove(self) -> None:
        """Remove the folder, now and once; a forked child that calls this removes nothing."""
        if not self.is_mine():
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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(handle)
