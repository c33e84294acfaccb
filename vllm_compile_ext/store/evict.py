"""What leaves a store: the least recently used entries, then the blobs that no entry needs.

Manifests go first, so that one killed half-way leaves only blobs that nobody needs.  Entries in use stay.  Blobs go
only while no writer is at work: it may be about to name them in its manifest.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import msgspec

from vllm_compile_ext.store.files import DamagedError, UnsafeStoreError
from vllm_compile_ext.store.store import Store

logger = logging.getLogger(__name__)

GRACE = 3600.0  # seconds that a file no entry needs is left alone: its writer may not be done

_DIGEST = re.compile(rb"[0-9a-f]{64}")


class Removed(msgspec.Struct, frozen=True):
    """manifests: "key/shard" of each entry that is gone; in_use: of each that stays for being in use; freed: bytes."""

    manifests: list[str]
    in_use: list[str]
    freed: int


class _Entry(NamedTuple):
    """A manifest's file: its size in bytes, seconds since its last use, digests of its blobs."""

    names: tuple[str, ...]
    size: int
    age: float
    digests: frozenset[str]


def remove(store: Store, key: str) -> Removed:
    """Remove the entries with this `key`, except those in use, and what only they needed.

    Raises `OSError` when the store cannot be written.
    """
    return _evict(store, lambda entry, total: entry.names[1] == key)


def keep_limit(store: Store) -> None:
    """After something was written: remove what is over the store's limit.  A failure costs a line."""
    if store.writable and store.max_bytes is not None:
        try:
            trim(store)
        except (OSError, UnsafeStoreError) as error:
            logger.warning("nothing could be removed from the store %s: %s", store.root, error)


def trim(store: Store, max_bytes: int | None = None, max_age: float | None = None) -> Removed:
    """Remove entries not used for `max_age` seconds, and the least recently used until the rest takes at most
    `max_bytes`, when None the store's own limit; then what nobody needs.  Entries in use stay.

    Raises `OSError` when the store cannot be written.
    """
    limit = store.max_bytes if max_bytes is None else max_bytes

    def is_due(entry: _Entry, total: int) -> bool:
        return (limit is not None and total > limit) or (max_age is not None and entry.age > max_age)

    return _evict(store, is_due)


def _evict(store: Store, is_due: Callable[[_Entry, int], bool]) -> Removed:
    """is_due: called with each entry, the least recently used one first, and the bytes that all remaining ones take."""
    tree = store.tree
    with tree.lock("store", exclusive=True, timeout=0) as alone:
        now = time.time()
        entries = sorted(_entries(store, now), key=lambda entry: -entry.age)
        blobs = store.blobs()
        sizes = {name: status.st_size for name, status in blobs.items()}
        users = Counter(name for entry in entries for name in entry.digests)
        total = sum(entry.size for entry in entries) + sum(sizes.get(name, 0) for name in users)
        gone, in_use, freed = [], [], 0
        for entry in entries:
            if not is_due(entry, total):
                continue
            shown = f"{entry.names[1]}/{entry.names[2].removesuffix('.json')}"
            if not tree.remove(*entry.names):
                in_use.append(shown)
                continue
            gone.append(shown)
            users.subtract(entry.digests)
            freed += entry.size
            total -= entry.size + sum(sizes.get(name, 0) for name in entry.digests if not users[name])
        if alone:
            for name, status in blobs.items():
                may_go = name in users or _age(status, now) > GRACE
                if not users[name] and may_go and tree.remove("blobs", name[:2], name):
                    freed += sizes[name]
            _sweep(store, now)
    return Removed(gone, in_use, freed)


def _entries(store: Store, now: float) -> list[_Entry]:
    found = []
    for names in store.files():
        with suppress(OSError, UnsafeStoreError):
            status = store.tree.stat(*names)
            data = b""
            with suppress(DamagedError):
                data = store.tree.read(*names)
            # Whatever looks like a digest is one: manifests of newer formats keep their blobs too.
            digests = frozenset(match.decode() for match in _DIGEST.findall(data))
            found.append(_Entry(names, status.st_size, _age(status, now), digests))
    return found


def _sweep(store: Store, now: float) -> None:
    """Remove what killed writers left, empty folders and the locks of entries that are gone."""
    tree = store.tree
    for key in tree.names("manifests"):
        tree.remove_folder("manifests", key)
    needed = {"store.lock", *(f"{key}.lock" for key in tree.names("manifests"))}
    stale = [("tmp", name) for name in tree.names("tmp")]
    stale += [("locks", name) for name in tree.names("locks") if name not in needed]
    for names in stale:
        with suppress(OSError):
            if _age(tree.stat(*names), now) > GRACE and not tree.remove(*names):
                tree.remove_folder(*names, full=True)


def _age(status: os.stat_result, now: float) -> float:
    """Seconds since a file was used; 0 when that was in the future, as after the clock was set back."""
    return max(0.0, now - status.st_mtime)
