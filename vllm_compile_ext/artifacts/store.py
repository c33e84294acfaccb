"""The store: what one start compiled, for the next ones.

Blobs are files named by their content; a manifest, written last, names the blobs of one entry.  Reading takes no lock.
Whatever is read is checked first, so a reader sees a whole entry or none.

    manifest = store.find(key, shard)
    if manifest is None:
        with store.writer(key, timeout) as mine:
            manifest = store.find(key, shard)  # another process may have written it meanwhile
            if manifest is None and mine:
                store.commit(Manifest(..., members={"plan": store.put(plan)}))
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vllm_compile_ext.artifacts import access, evict, files, locks
from vllm_compile_ext.artifacts.access import UnsafeStoreError
from vllm_compile_ext.artifacts.evict import Removed
from vllm_compile_ext.artifacts.files import DamagedError, MissingError
from vllm_compile_ext.artifacts.layout import Layout
from vllm_compile_ext.artifacts.manifest import Blob, Manifest, ManifestError, decode, digest, encode

__all__ = ["DamagedError", "MissingError", "Removed", "Store", "UnsafeStoreError"]

logger = logging.getLogger(__name__)


class Store:
    """A store below the folder `root`; `open` makes one.

    layout: where its files are.
    writable: False when it can only be read (a read-only mount, another user's folder).
    max_bytes: what its entries may take, None for no limit; kept each time a writer is done.
    """

    def __init__(self, root: Path, max_bytes: int | None, *, writable: bool) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.writable = writable
        self.layout = Layout(root)
        self._grown = False  # something was committed since the last `gc`
        self._told: set[Path] = set()  # manifests that a warning named

    @classmethod
    def open(cls, root: Path, max_bytes: int | None = None) -> Store:
        """The store below `root`, made where there is none.  Raises `UnsafeStoreError` when others can write it."""
        root = root.expanduser().absolute()
        layout = Layout(root)
        folders = (root, layout.v1, layout.blobs, layout.manifests, layout.locks, layout.tmp)
        with suppress(OSError):
            root.parent.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            with suppress(OSError):
                files.make_folder(folder)
            access.check(folder, root)
        writable = all(map(access.writable, folders[2:]))
        if not writable:
            logger.info("the store %s cannot be written by user %d: it is only read", root, os.geteuid())
        return cls(root, max_bytes, writable=writable)

    def find(self, key: str, shard: str) -> Manifest | None:
        """The manifest of an entry.  A damaged one, or one of another format, counts as none: one warning names it.

        Its blobs are not looked at.  Raises `ManifestError` when `key` or `shard` is not allowed.
        """
        try:
            return self._load(self.layout.manifest(key, shard))
        except MissingError:
            return None
        except DamagedError as error:
            if error.path not in self._told:
                logger.warning("%s; it is not used", error)
            self._told.add(error.path)
            return None

    def variants(self, key: str, shard: str) -> list[Manifest]:
        """The manifests of an entry whose shards are `shard` and a suffix after a dot, the last used first."""
        paths = sorted(self.layout.variants(key, shard), key=lambda path: -evict.used(path))
        return [manifest for path in paths if (manifest := self.find(key, path.stem)) is not None]

    def manifests(self) -> Iterator[Manifest]:
        """All that can be read; `verify` tells about the others."""
        for path in sorted(self.layout.manifests.glob("*/*.json")):
            with suppress(DamagedError):
                yield self._load(path)

    def _load(self, path: Path) -> Manifest:
        try:
            manifest = decode(files.read(path))
        except ManifestError as error:
            raise DamagedError(path, str(error)) from error
        if self.layout.manifest(manifest.key, manifest.shard) != path:
            raise DamagedError(path, f"is the manifest of another entry, {manifest.key}/{manifest.shard}")
        return manifest

    def get(self, blob: Blob) -> bytes:
        """The bytes of `blob`, with the right digest.  Raises `DamagedError`, also when they are missing."""
        return self._check(self.layout.blob(blob), blob.digest, blob.size)

    @staticmethod
    def _check(path: Path, expected: str, size: int | None) -> bytes:
        data = files.read(path, size)
        if digest(data) != expected:
            raise DamagedError(path, "is corrupt: its digest does not match")
        return data

    def put(self, data: bytes) -> Blob:
        """Keep `data`; what is there and whole is not written again, what is damaged is replaced.

        Call it as the `writer` of the entry that will name the blob: others may be removed.  Raises `OSError` as it
        comes (full disk, read-only), and then leaves nothing.
        """
        blob = Blob(digest(data), len(data))
        path = self.layout.blob(blob)
        try:
            self.get(blob)
        except DamagedError:
            files.write(path, data, self.layout.tmp)
        else:
            with suppress(OSError):
                os.utime(path)  # still wanted, though perhaps by no manifest yet
        return blob

    def commit(self, manifest: Manifest) -> None:
        """Make `manifest` the one of its key and shard in one step, after all its blobs were `put`; then `use` it.

        Raises `OSError` as it comes, and then leaves what was there.
        """
        files.write(self.layout.manifest(manifest.key, manifest.shard), encode(manifest), self.layout.tmp)
        self._grown = True
        self.use(manifest)

    @contextmanager
    def writer(self, key: str, timeout: float) -> Iterator[bool]:
        """Wait until nobody else writes `key`, at most `timeout` seconds.

        True: this process is the one writer; look again whether there still is something to write.  False: the wait was
        over the bound, or the store cannot be written.  Afterwards the store is back within `max_bytes`.
        """
        with ExitStack() as held:
            yield self.writable and self._lock(held, key, timeout)
        if self._grown and self.max_bytes is not None:
            try:
                self.gc()
            except OSError as error:
                logger.warning("nothing could be removed from the store %s: %s", self.root, error)

    def _lock(self, held: ExitStack, key: str, timeout: float) -> bool:
        timeout = max(0.0, timeout)  # less than 0 would be for ever
        deadline = time.monotonic() + timeout
        try:
            files.make_folder(self.layout.locks)  # the store may have been deleted since
            held.enter_context(FileLock(self.layout.lock(key), timeout=timeout, mode=0o600))
            # Afterwards: who waits for a key must not keep unneeded blobs from being removed.
            left = max(0.0, deadline - time.monotonic())
            return held.enter_context(locks.locked(self.layout.store_lock, exclusive=False, timeout=left))
        except Timeout:
            if timeout == 0:  # only asked
                return False
            logger.warning("another process has been writing %s for over %g s: not waiting for it", key, timeout)
        except OSError as error:
            logger.warning("the store %s cannot be locked: %s", self.root, error)
        return False

    def use(self, manifest: Manifest) -> None:
        """Mark the entry as used now, and as in use until this process ends: meanwhile nothing evicts it."""
        with suppress(OSError):
            locks.hold(self.layout.manifest(manifest.key, manifest.shard))

    def remove(self, prefix: str) -> Removed:
        """Remove the entries whose key begins with `prefix`, except those in use, and what only they needed.

        Raises `ManifestError` when `prefix` cannot begin a key, `OSError` when the store cannot be written.
        """
        if not re.fullmatch("[0-9a-f]{1,64}", prefix):
            raise ManifestError(f"{prefix!r} does not begin a key: 1 to 64 lower hexadecimal digits do")
        return evict.evict(self.layout, lambda entry, total: entry.key.startswith(prefix))

    def gc(self, max_bytes: int | None = None, max_age: float | None = None) -> Removed:
        """Remove entries until the rest takes at most `max_bytes`, least recently used first, and those not used for
        `max_age` seconds; then what nobody needs.  Entries in use stay.

        max_bytes: the store's own limit when None.  Raises `OSError` when the store cannot be written.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        self._grown = False

        def wanted(entry: evict.Entry, total: int) -> bool:
            return (limit is not None and total > limit) or (max_age is not None and entry.age > max_age)

        return evict.evict(self.layout, wanted)

    def verify(self) -> list[DamagedError]:
        """Everything that is damaged or missing: manifests, their blobs, and blobs that no manifest names."""
        problems: list[DamagedError] = []
        blobs: set[Blob] = set()
        for path in sorted(self.layout.manifests.glob("*/*.json")):
            try:
                blobs.update(self._load(path).members.values())
            except DamagedError as error:
                problems.append(error)
        paths = {self.layout.blob(blob): blob for blob in blobs}
        for path in sorted(paths.keys() | set(self.layout.blobs.glob("??/*"))):
            try:
                self._check(path, path.name, paths[path].size if path in paths else None)
            except DamagedError as error:
                if path in paths or not isinstance(error, MissingError):  # else just removed, needed by none
                    problems.append(error)
        return problems

    def size(self) -> int:
        """Bytes of all blobs and manifests."""
        return evict.size(self.layout)
