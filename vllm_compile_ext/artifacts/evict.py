"""What leaves a store: the least recently used entries, then the blobs that no entry needs.

Manifests go first, so that one killed half-way leaves only blobs that nobody needs.  Entries in use stay.  Blobs go
only while no writer is at work: it may be about to name them in its manifest.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vllm_compile_ext.artifacts import files, locks
from vllm_compile_ext.artifacts.layout import Layout

GRACE = 3600.0  # seconds that a file no entry needs is left alone: its writer may not be done

_DIGEST = re.compile(rb"[0-9a-f]{64}")


class Removed(msgspec.Struct, frozen=True):
    """manifests: "key/shard" of each entry that is gone; in_use: of each that stays for being in use; freed: bytes."""

    manifests: list[str]
    in_use: list[str]
    freed: int


@dataclass(frozen=True)
class Entry:
    """A manifest's file: its size in bytes, seconds since its last use, digests of its blobs."""

    path: Path
    size: int
    age: float
    digests: frozenset[str]

    @property
    def key(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return f"{self.key}/{self.path.stem}"


def evict(layout: Layout, wanted: Callable[[Entry, int], bool]) -> Removed:
    """Remove the entries that are `wanted`, then what nobody needs.

    wanted: called with each entry, the least recently used one first, and the bytes that all remaining ones take.
    Raises `OSError` when the store cannot be written.
    """
    with locks.locked(layout.store_lock, exclusive=True, timeout=0) as alone:
        now = time.time()
        entries = sorted(_entries(layout, now), key=lambda entry: -entry.age)
        blobs = {path.name: path for path in layout.blobs.glob("??/*")}
        sizes = {name: _size(path) for name, path in blobs.items()}
        users = Counter(name for entry in entries for name in entry.digests)
        total = sum(entry.size for entry in entries) + sum(sizes.get(name, 0) for name in users)
        gone, in_use, unneeded, freed = [], [], set(), 0
        for entry in entries:
            if not wanted(entry, total):
                continue
            if not locks.remove(entry.path):
                in_use.append(entry.name)
                continue
            gone.append(entry.name)
            users.subtract(entry.digests)
            last = {name for name in entry.digests if not users[name]}
            unneeded |= last
            freed += entry.size
            total -= entry.size + sum(sizes.get(name, 0) for name in last)
        if alone:
            stale = {name for name, path in blobs.items() if not users[name] and _age(path, now) > GRACE}
            freed += sum(sizes[name] for name in (unneeded | stale) & blobs.keys() if locks.remove(blobs[name]))
            _sweep(layout, now)
    return Removed(gone, in_use, freed)


def _sweep(layout: Layout, now: float) -> None:
    """Remove what killed writers left, empty folders and the locks of entries that are gone."""
    for path in layout.tmp.iterdir():
        if _age(path, now) > GRACE:
            locks.remove(path)
    for folder in layout.manifests.iterdir():
        with suppress(OSError):
            folder.rmdir()  # fails unless it is empty
    for path in layout.locks.glob("*.lock"):
        if path != layout.store_lock and _age(path, now) > GRACE and not (layout.manifests / path.stem).exists():
            locks.remove(path)


def _entries(layout: Layout, now: float) -> Iterator[Entry]:
    for path in layout.manifests.glob("*/*.json"):
        try:
            data = files.read(path)
        except files.DamagedError:
            data = b""
        # Whatever looks like a digest is one: manifests of newer formats keep their blobs too.
        digests = frozenset(match.decode() for match in _DIGEST.findall(data))
        yield Entry(path, _size(path), _age(path, now), digests)


def _age(path: Path, now: float) -> float:
    """Seconds since the file was used; 0 when that was in the future, as after the clock was set back."""
    try:
        return max(0.0, now - path.lstat().st_mtime)
    except OSError:
        return 0.0


def used(path: Path) -> float:
    """When a file was used last, unix time; 0 when it is gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def size(layout: Layout) -> int:
    """Bytes of all blobs and manifests."""
    return sum(_size(path) for path in (*layout.blobs.glob("??/*"), *layout.manifests.glob("*/*.json")))
