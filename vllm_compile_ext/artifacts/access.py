"""Who can write a store.  What is in it will be run, so only its owner and root may."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path


class UnsafeStoreError(RuntimeError):
    """Others can change the store; the message has the command that mends it."""


def check(folder: Path, root: Path) -> None:
    """Raises `UnsafeStoreError` when others can write `folder`, a part of the store `root`; a missing one is fine.

    On a read-only mount the owner does not matter: an image is often built by another user.
    """
    try:
        found = folder.stat()
        fixed = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return  # not there, or not ours to look into: nothing will be read from it either
    quoted = shlex.quote(str(root))
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeStoreError(
            f"{folder} can be written by other users (mode {stat.S_IMODE(found.st_mode):04o}), and what is in it would "
            f"be run. Run: chmod -R go-w {quoted}"
        )
    me = os.geteuid()
    if found.st_uid not in (me, 0) and not fixed:
        raise UnsafeStoreError(
            f"{folder} belongs to user {found.st_uid}, this process to user {me}, and what is in it would be run. "
            f"Run as root: chown -R {me} {quoted}"
        )


def writable(folder: Path) -> bool:
    """Whether this process may make files in `folder`."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)
