"""Files as the store reads and writes them: whole or not at all, never through a link, written by nobody else.

What lies in a store is run.  So each folder is opened inside of the one that was opened before it, and owner and mode
are checked on what is open: a name that means something else a moment later is never looked up again.

    where                        whose it may be           who may write
    above the store              ours, root's              the same, and others where a folder is sticky
    a volume's root above it     whoever mounted it decided that
    the store, all below it      ours, root's              the same; files 0600, folders 0700
    a store that a group shares  as well its members'      as well its members; files 0660, folders 2770

In a folder that everyone can write, a group says nothing of who made something: it has to be ours or root's.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import os
import re
import shlex
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar
from uuid import uuid4

from vllm_compile_ext import settings

_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a pipe that someone put there would wait for ever.
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_POLL = 0.05  # seconds between two attempts to get a lock
_SHARING = 1.0  # seconds in which something new has got its mode
_LOOK = 0.2  # seconds that `hold` waits for one that only looks whether the file is held

_T = TypeVar("_T")
_held: set[tuple[int, int]] = set()  # device and inode of what `hold` locked in this process


class UnsafeStoreError(RuntimeError):
    """Others can change the store; the message names the folder, its mode and owner, and the way out."""


class DamagedError(RuntimeError):
    """The file `path` is not what was written, or cannot be read; the message says how."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}")
        self.path = path


class MissingError(DamagedError):
    """The file is not there."""


class Tree:
    """The folder ``v1`` of the store `root`, and the files below it by the names that lead to them.

    It is opened when it is first needed and stays open, wherever it is moved; one that was deleted is opened anew.
    All methods but `read`, `names`, `in_use` and `remove` raise `OSError` as it comes, and `UnsafeStoreError`.

    jit: the folder of kernel compilers' caches; users have their own.  group: who shares the store, None for nobody.
    movable: a folder above in which others can put another store in its place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "v1"
        self.jit = self.path / (f"jit-{os.geteuid()}" if settings.store_group() else "jit")
        self.group: int | None = None
        self.movable: Path | None = None
        self._handle: int | None = None
        self._opening = threading.Lock()

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    @contextmanager
    def folder(self, *names: str, make: bool = False, private: bool = False) -> Iterator[int]:
        """A folder, open; `make` makes those that are missing.

        private: check those below `jit`, too.  Libraries make them by the umask, but nobody else gets as far.
        """
        with ExitStack() as opened:
            with self._opening:
                if self._handle is None or os.fstat(self._handle).st_nlink == 0:
                    self._handle, self.group, self.movable = _open_v1(self.root, make)
                handle, path = self._handle, self.path
            for number, name in enumerate(names):
                path /= name
                handle = _enter(handle, name, path, self.group, make)
                opened.callback(os.close, handle)
                if private or number == 0 or names[0] != self.jit.name:
                    _check(path, os.fstat(handle), self.group, self.root)
            yield handle

    def names(self, *names: str) -> list[str]:
        """What is in a folder, sorted; nothing when it cannot be read."""
        try:
            with self.folder(*names) as handle:
                return sorted(os.listdir(handle))  # noqa: PTH208 - of an open folder
        except (OSError, UnsafeStoreError):
            return []

    def stat(self, *names: str) -> os.stat_result:
        """The status of a file or a link."""
        with self.folder(*names[:-1]) as handle:
            return os.stat(names[-1], dir_fd=handle, follow_symlinks=False)

    def read(self, *names: str, size: int | None = None, most: int = sys.maxsize) -> bytes:
        """All bytes of a regular file.

        Raises `DamagedError` when it is none, has another size than `size` or more than `most`, or others can write it.
        """
        path = self.path.joinpath(*names)
        try:
            with self.folder(*names[:-1]) as folder, _opened(names[-1], os.O_RDONLY, folder) as handle:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    raise DamagedError(path, "is not a regular file")
                if why := _unsafe(found, self.group):
                    raise DamagedError(path, why)
                if size is not None and found.st_size != size:
                    raise DamagedError(path, f"has {found.st_size} bytes where {size} were written")
                if found.st_size > most:
                    raise DamagedError(path, f"has {found.st_size} bytes, more than {most}")
                with os.fdopen(handle, "rb", buffering=0, closefd=False) as file:
                    return file.read()
        except FileNotFoundError:
            raise MissingError(path, "is missing") from None
        except UnsafeStoreError as error:
            raise DamagedError(path, f"is not read: {error}") from error
        except OSError as error:
            what = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
            raise DamagedError(path, what) from error

    def write(self, *names: str, data: bytes) -> None:
        """Make `data` a file in one step.  When that fails, what was there is as it was."""
        with self.folder("tmp", make=True) as temporary, self.folder(*names[:-1], make=True) as folder:
            name = uuid4().hex
            handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=temporary)
            try:
                with os.fdopen(handle, "wb") as file:
                    _share(handle, 0o600, self.group)
                    file.write(data)
                    file.flush()
                    os.fsync(handle)  # before the rename: a name without its bytes would survive a power cut
                os.replace(name, names[-1], src_dir_fd=temporary, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name, dir_fd=temporary)
                raise
            # The file is in place and whole; at worst a power cut takes its name.
            with suppress(OSError):
                os.fsync(folder)

    def hold(self, *names: str) -> None:
        """Mark a file as used now, and as in use until this process and those it forks have ended.

        Raises `OSError` also while the file is being removed.
        """
        with self.folder(*names[:-1]) as folder, ExitStack() as opened:
            handle = os.open(names[-1], os.O_RDONLY | _FILE, dir_fd=folder)
            opened.callback(os.close, handle)
            found = os.fstat(handle)
            if (found.st_dev, found.st_ino) not in _held:
                if not _lock(handle, fcntl.LOCK_SH, _LOOK):
                    raise BlockingIOError(f"{self.path.joinpath(*names)} is being removed")
                _held.add((found.st_dev, found.st_ino))
                opened.pop_all()  # the lock lasts as long as the file is open
            os.utime(handle)

    def in_use(self, *names: str) -> bool:
        """Whether a process holds a file; False also where that cannot be found out."""
        with (
            suppress(OSError, UnsafeStoreError),
            self.folder(*names[:-1]) as folder,
            _unheld(names[-1], folder) as free,
        ):
            return not free
        return False

    def remove(self, *names: str) -> bool:
        """Remove a file unless someone holds it; returns whether it is gone."""
        with suppress(OSError), self.folder(*names[:-1]) as folder, _unheld(names[-1], folder) as free:
            if free:
                with suppress(FileNotFoundError):
                    os.unlink(names[-1], dir_fd=folder)
            return free
        return False

    def remove_folder(self, *names: str, full: bool = False) -> None:
        """Remove a folder when nothing is in it, or with what is in it."""
        with suppress(OSError), self.folder(*names[:-1]) as folder:
            if full:
                shutil.rmtree(names[-1], dir_fd=folder)
            else:
                os.rmdir(names[-1], dir_fd=folder)

    @contextmanager
    def lock(self, name: str, *, exclusive: bool, timeout: float) -> Iterator[bool]:
        """Lock `name`, alone or shared; False when that takes longer than `timeout` seconds.

        The kernel gives the lock back when the process ends, however it ends.  Raises `OSError` also when the file
        system knows no locks.
        """
        with self.folder("locks", make=True) as folder:
            handle = _open_shared(f"{name}.lock", os.O_RDWR | os.O_CREAT | _FILE, folder, self.group)
        try:
            with suppress(PermissionError):  # another member of the group made it, and has shared it
                _share(handle, 0o600, self.group)
            yield _lock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, timeout)
        finally:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file open too
            os.close(handle)


def is_plain_path(path: str) -> bool:
    """Whether `path` is printable, relative, and stays below its folder."""
    return path.isprintable() and "\\" not in path and not {"", ".", ".."}.intersection(path.split("/"))


def is_writable(folder: int) -> bool:
    """Whether this process may make files in an open folder."""
    return os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True)


# --- opening and locking


@contextmanager
def _opened(name: str, flags: int, folder: int) -> Iterator[int]:
    handle = os.open(name, flags | _FILE, dir_fd=folder)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _unheld(name: str, folder: int) -> Iterator[bool]:
    """Whether nobody holds a file; then nobody can hold it before the end of the block."""
    with ExitStack() as opened:
        try:
            try:  # NFS locks alone only what is open for writing
                handle = opened.enter_context(_opened(name, os.O_RDWR, folder))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                handle = opened.enter_context(_opened(name, os.O_RDONLY, folder))
            free = _lock(handle, fcntl.LOCK_EX, 0)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOENT):
                raise
            free = True  # a link, or gone: nobody can hold it
        yield free


def _retry(attempt: Callable[[], _T], error: type[OSError], seconds: float) -> _T:
    """What `attempt` returns once it does not raise `error`, or that error after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except error:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL)


def _lock(handle: int, operation: int, timeout: float) -> bool:
    try:
        _retry(lambda: fcntl.flock(handle, operation | fcntl.LOCK_NB), BlockingIOError, timeout)
    except BlockingIOError:
        return False
    return True


def _open_shared(name: str, flags: int, folder: int, group: int | None) -> int:
    """In a shared store another member may have made it, and be about to share it."""
    patience = 0 if group is None else _SHARING
    return _retry(lambda: os.open(name, flags, 0o600, dir_fd=folder), PermissionError, patience)


def _enter(folder: int, name: str, path: Path, group: int | None, make: bool, mode: int = 0o700) -> int:
    """The folder `name` in an open one, open; made where `make` says so."""
    made = False
    try:
        if make:
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=folder)
                made = True
        handle = _open_shared(name, os.O_RDONLY | _FOLDER, folder, group)
    except NotADirectoryError:
        raise UnsafeStoreError(f"{path} is not a folder: move it away") from None
    except OSError as error:
        error.filename = str(path)  # not only the last part
        raise
    if made:
        _share(handle, mode, group)
    return handle


def _share(handle: int, mode: int, group: int | None) -> None:
    """Give what was just made its `mode`, whatever the umask; in a shared store its group may do what its owner may."""
    if group is not None:
        mode |= (mode & 0o700) >> 3 | (stat.S_ISGID if mode & 0o100 else 0)
        if os.fstat(handle).st_gid != group:
            os.fchown(handle, -1, group)
    if stat.S_IMODE(os.fstat(handle).st_mode) & mode != mode:  # file systems without modes refuse to change one
        os.fchmod(handle, mode)


# --- the way to the store


class _Place(NamedTuple):
    """An open folder on the way to the store.  mount: the number of its file system's mount, where that is known."""

    path: Path
    handle: int
    status: os.stat_result
    mount: str | None


def _open_v1(root: Path, make: bool) -> tuple[int, int | None, Path | None]:
    """Open the folder ``v1`` of the store `root`; returns it, `Tree.group` and `Tree.movable`."""
    share = settings.store_group()
    real = Path(os.path.realpath(root))
    with ExitStack() as opened:
        way = _walk(real, opened)
        was_there = len(way) == len(real.parts)
        volume = max(i for i, place in enumerate(way) if i == 0 or place.mount not in (way[i - 1].mount, None))
        _check_above(way[volume : len(real.parts) - 1], root, share)
        for name in real.parts[len(way) :]:
            outer, path = way[-1], way[-1].path / name
            inherits = share and path == real and _is_mine(outer.status.st_gid)
            mode = 0o700 if path == real else 0o755
            handle = _enter(outer.handle, name, path, outer.status.st_gid if inherits else None, make, mode)
            way.append(_place(path, handle, opened))
        store, outer = way[-1], way[-2:][0]
        above = way[volume:-1]  # from the volume's root to the folder that the store is in
        movable = _check_above(above, root, share)  # again: somebody else may have made what was missing
        is_shared = share and store.status.st_mode & stat.S_IWGRP and _is_mine(store.status.st_gid)
        group = store.status.st_gid if is_shared else None
        # A volume's root may be everyone's, as Kubernetes makes an emptyDir: then what is in it has to be ours.
        if share and was_there and not above and store.status.st_uid == 0:
            movable = root if _is_everyones(store.status) else None
        else:
            _check(root, store.status, group, root, owned=_is_everyones(outer.status))
        with ExitStack() as failed:
            handle = _enter(store.handle, "v1", root / "v1", group, make)
            failed.callback(os.close, handle)
            _check(root / "v1", os.fstat(handle), group, root, owned=_is_everyones(store.status))
            failed.pop_all()
        return handle, group, movable


def _walk(real: Path, opened: ExitStack) -> list[_Place]:
    """The folders from / to `real`, as far as they are there, each opened inside of the one before it."""
    way = [_place(Path("/"), os.open("/", os.O_PATH | _FOLDER), opened)]
    for name in real.parts[1:]:
        try:
            handle = os.open(name, os.O_PATH | _FOLDER, dir_fd=way[-1].handle)
        except FileNotFoundError:
            break
        way.append(_place(way[-1].path / name, handle, opened))
    return way


def _place(path: Path, handle: int, opened: ExitStack) -> _Place:
    opened.callback(os.close, handle)
    try:  # proc_pid_fdinfo(5), since Linux 3.15
        mount = re.search(r"^mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{handle}").read_text(), re.MULTILINE)
    except OSError:
        mount = None
    return _Place(path, handle, os.fstat(handle), mount and mount[1])


# --- who may write


def _is_everyones(found: os.stat_result) -> bool:
    return bool(found.st_mode & stat.S_IWOTH)


def _is_mine(group: int) -> bool:
    return group == os.getegid() or group in os.getgroups()


@functools.cache
def _unmapped() -> int | None:
    """Whose everything seems to be that belongs to users outside of this user namespace (user_namespaces(7))."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return None


def _others_write(found: os.stat_result, group: int | None) -> bool:
    """Whether the mode lets others than the owner and `group` write."""
    return bool(found.st_mode & (stat.S_IWOTH if found.st_gid == group else stat.S_IWOTH | stat.S_IWGRP))


def _unsafe(found: os.stat_result, group: int | None, *, owned: bool = False) -> str | None:
    """How others than `group` can have written something: it continues a sentence that begins with its name.

    owned: that it has the group does not say who made it.
    """
    me, shared = os.geteuid(), found.st_gid == group
    if _others_write(found, group):
        mode = stat.S_IMODE(found.st_mode)
        return f"can be written by other users (mode {mode:04o}, user {found.st_uid}, group {found.st_gid})"
    if (found.st_uid not in (me, 0) and (owned or not shared)) or found.st_uid == _unmapped():
        return f"belongs to user {found.st_uid}, this process to user {me}"
    return None


def _check(path: Path, found: os.stat_result, group: int | None, root: Path, *, owned: bool = False) -> None:
    """Raises `UnsafeStoreError` where others can write the folder `path` of the store `root`."""
    why = _unsafe(found, group, owned=owned)
    if why is None:
        return
    me, quoted = os.geteuid(), shlex.quote(str(root))
    ways = []
    if not _is_everyones(found) and found.st_mode & stat.S_IWGRP and group is None:
        if _is_mine(found.st_gid):
            ways.append(f"To trust everyone in group {found.st_gid}, set VLLM_COMPILE_STORE_GROUP=1.")
    elif path == root:
        ways.append(f"A folder in it may do: VLLM_COMPILE_STORE={shlex.quote(str(root / 'store'))}.")
    if _others_write(found, group):
        who = "" if me in (0, found.st_uid) else f" as user {found.st_uid}"
        ways.append(f"Run{who}: chmod -R {'go' if group is None else 'o'}-w {quoted}")
    else:
        ways.append(f"Name another folder in VLLM_COMPILE_STORE. Run as root: chown -R {me} {quoted}")
    raise UnsafeStoreError(f"{path} {why}, and what is in it would be run. {' Or: '.join(ways)}")


def _check_above(above: Sequence[_Place], root: Path, share: bool) -> Path | None:
    """Check the folders `above` the store `root`; returns the first, a volume's root, where others can move the store.

    Raises `UnsafeStoreError` where they can do so in one of the others.
    """
    me = os.geteuid()
    for outer, (path, _, found, _) in itertools.pairwise(above):
        group = _group_above(found, share)
        why = _unsafe(found, group, owned=_is_everyones(outer.status))
        if why is None or (found.st_mode & stat.S_ISVTX and found.st_uid in (me, 0)):
            continue
        can_mend = _others_write(found, group) and me in (0, found.st_uid)
        mend = f"run chmod go-w {shlex.quote(str(path))}, or " if can_mend else ""
        raise UnsafeStoreError(
            f"{path} {why}: another store could be put in the place of {root}. To mend it, {mend}name a folder "
            "elsewhere in VLLM_COMPILE_STORE"
        )
    if not above:
        return None
    volume = above[0].status
    is_movable = not volume.st_mode & stat.S_ISVTX and _others_write(volume, _group_above(volume, share))
    return above[0].path if is_movable else None


def _group_above(found: os.stat_result, share: bool) -> int | None:
    """The group that may write a folder above the store."""
    # A group of one: many systems give a user a group of the same number, and let it write.
    alone = found.st_gid == os.getegid() == os.geteuid()
    return found.st_gid if alone or (share and _is_mine(found.st_gid)) else None
