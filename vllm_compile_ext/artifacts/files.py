"""Files as the store reads and writes them: whole or not at all, never through a link, owner-only."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Without O_NONBLOCK, opening a pipe that someone put there would wait for ever.
SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class DamagedError(RuntimeError):
    """The file `path` is not what was written, or cannot be read; the message says how."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}")
        self.path = path


class MissingError(DamagedError):
    """The file is not there."""


def make_folder(path: Path) -> None:
    """Make the folder `path` and missing ones above it, mode 0700 whatever the umask.  Raises `OSError`."""
    try:
        path.mkdir(0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        make_folder(path.parent)
        make_folder(path)
    else:
        path.chmod(0o700)


def read(path: Path, size: int | None = None) -> bytes:
    """All bytes of the regular file `path`.  Raises `DamagedError` when it is none, or not of `size` bytes."""
    try:
        handle = os.open(path, os.O_RDONLY | SAFE)
    except FileNotFoundError:
        raise MissingError(path, "is missing") from None
    except OSError as error:
        what = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise DamagedError(path, what) from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(path, "is not a regular file")
        if size is not None and found.st_size != size:
            raise DamagedError(path, f"has {found.st_size} bytes where {size} were written")
        with os.fdopen(handle, "rb", buffering=0, closefd=False) as file:
            return file.read()
    except OSError as error:
        raise DamagedError(path, f"cannot be read ({error.strerror})") from error
    finally:
        os.close(handle)


def write(path: Path, data: bytes | Iterable[bytes], temporary: Path) -> None:
    """Make `data` the file `path`, mode 0600, in one step; the folder `temporary` is on the same file system.

    Raises `OSError` as it comes (full disk, read-only), and whatever making the parts of `data` raises; `path` is then
    left as it was.
    """
    make_folder(temporary)
    handle, name = tempfile.mkstemp(dir=temporary)
    written = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o600)
            file.writelines((data,) if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(handle)  # before the rename: a name without its bytes would survive a power cut
        move(written, path)
    except BaseException:
        with suppress(OSError):
            written.unlink()
        raise


def move(written: Path, path: Path) -> None:
    """Make the file `written` the file `path`, on the same file system.  Raises `OSError`, and then did nothing."""
    make_folder(path.parent)
    written.replace(path)
    # The file is in place and whole; at worst a power cut takes its name.
    with suppress(OSError):
        _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
