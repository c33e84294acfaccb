"""The folder that Inductor works in while this process compiles; nothing in it outlives the process.

Upstream keeps Inductor's files for all starts.  A compiler that was killed leaves half a kernel there, and the next
start maps it.  What is worth keeping is in the store; so each process gets a folder of its own.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "compile_scratch"  # of the folder in vLLM's cache root

_folder: Path | None = None
_lock: int | None = None


def folder() -> Path:
    """This process's folder, made on the first call: below vLLM's cache root, or the system's temporary folder.

    Folders of processes that are gone are removed.
    """
    global _folder
    if _folder is None:
        import vllm.envs

        root = Path(vllm.envs.VLLM_CACHE_ROOT) / NAME
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_abandoned(root)
            _folder = _make(root)
        except OSError as error:
            _folder = _make(Path(tempfile.gettempdir()))
            logger.warning("compiling in %s: %s cannot be written (%s)", _folder, root, error.strerror)
        atexit.register(forget)
    return _folder


def inductor() -> Path:
    """Where Inductor keeps its files."""
    path = folder() / "inductor"
    path.mkdir(exist_ok=True)
    return path


def forget() -> None:
    """Remove the folder."""
    global _folder, _lock
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
    if _lock is not None:
        os.close(_lock)
    _folder, _lock = None, None


def _make(root: Path) -> Path:
    global _lock
    made = Path(tempfile.mkdtemp(prefix="vllm-compile-", dir=root))
    _lock = os.open(made / "in use", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (made / "probe").write_bytes(bytes(1 << 16))  # a full disk can make a folder, and nothing in it
        (made / "probe").unlink()
    except OSError:
        forget()
        shutil.rmtree(made, ignore_errors=True)
        raise
    return made


def remove_abandoned(root: Path) -> None:
    """Remove the folders below `root` of processes that are gone."""
    for path in root.glob("vllm-compile-*"):
        try:
            handle = os.open(path / "in use", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # being made, or being removed
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(handle)
