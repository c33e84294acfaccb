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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from blake3 import blake3

from vllm_compile_ext.store.files import (
    DamagedError,
    MissingError,
    Tree,
    UnsafeStoreError,
    is_plain_path,
    is_writable,
)

__all__ = ["DamagedError", "MissingError", "Store", "UnsafeStoreError"]

logger = logging.getLogger(__name__)

FORMAT = 3  # of manifests; raised when a reader of the old one would misread the new one
MANIFEST_MAX = 4 << 20  # bytes; they have about 200 kB
ROOMS = ("blobs", "manifests", "locks", "tmp")

_DIGEST = "[0-9a-f]{64}"
_SHARD = "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}"
_T = TypeVar("_T")


class _Keyed(Protocol):
    @property
    def key(self) -> str: ...


_K = TypeVar("_K", bound=_Keyed)


class ManifestError(RuntimeError):
    """Not a sealed record, a damaged one, or one with names that are not allowed; the message says what."""


def digest(data: bytes) -> str:
    """blake3 of `data`, 64 lower hexadecimal digits."""
    return blake3(data).hexdigest()


def key_of(factors: dict[str, str]) -> str:
    """The key of what was made from `factors`, a digest; their order does not matter."""
    return digest(msgspec.json.encode(factors, order="sorted"))


class _Format(msgspec.Struct):
    format: int


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    seal: str
    record: msgspec.Raw


def seal(record: Any, made: int = FORMAT) -> bytes:
    """The file of a record: ``{"format": 3, "seal": "<digest of the next value's bytes>", "record": {...}}``."""
    inner = msgspec.json.encode(record)
    return msgspec.json.encode(_Sealed(made, digest(inner), msgspec.Raw(inner)))


def unseal(data: bytes, kind: type[_T], expected: int = FORMAT) -> _T:
    """The record of which `data` is the file.  Raises `ManifestError`."""
    try:
        made = msgspec.json.decode(data, type=_Format).format
        if made != expected:
            raise ManifestError(f"was written in format {made}, this version reads {expected}")
        sealed = msgspec.json.decode(data, type=_Sealed)
        if digest(bytes(sealed.record)) != sealed.seal:
            raise ManifestError("is corrupt: its digest does not match")
        return msgspec.json.decode(sealed.record, type=kind)
    # msgspec raises RecursionError on deep nesting, and ValueError where text is not UTF-8.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestError(f"is no record ({error})") from error


def read_record(root: Path, folder: str, key: str, kind: type[_K], made: int) -> _K | None:
    """The record of this key, beside the code in the store `root`; None where there is none to be read."""
    with suppress(DamagedError, ManifestError):
        found = unseal(Tree(root).read(folder, f"{key}.json"), kind, made)
        return found if found.key == key else None
    return None


def write_record(root: Path, folder: str, record: _Keyed, made: int, most: int) -> None:
    """Replace the record of this key, and drop the oldest of the folder beyond `most`.

    Raises `OSError`, and `UnsafeStoreError` when others can write the store.
    """
    tree = Tree(root)
    tree.write(folder, f"{record.key}.json", data=seal(record, made))
    with suppress(OSError):
        names = sorted(tree.names(folder), key=lambda name: tree.stat(folder, name).st_mtime)
        for name in names[:-most]:
            tree.remove(folder, name)


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some bytes of the store, by their `digest` and `size` in bytes."""

    digest: Annotated[str, msgspec.Meta(pattern=rf"\A{_DIGEST}\Z")]
    size: Annotated[int, msgspec.Meta(ge=0)]

    @property
    def names(self) -> tuple[str, ...]:
        """Where it lies in a store."""
        return "blobs", self.digest[:2], self.digest


def total(blobs: Iterable[Blob]) -> int:
    """Bytes of `blobs`, each counted once."""
    return sum(blob.size for blob in {blob.digest: blob for blob in blobs}.values())


def manifest_names(key: str, shard: str) -> tuple[str, ...]:
    """Where a manifest lies in a store.  Raises `ManifestError` where a name is not allowed."""
    if not re.fullmatch(_DIGEST, key):
        raise ManifestError(f"key {key!r} is not allowed: 64 lower hexadecimal digits are")
    if not re.fullmatch(_SHARD, shard) or ".." in shard:
        raise ManifestError(f"shard {shard!r} is not allowed: up to 100 letters, digits and _.- are, without '..'")
    return "manifests", key, f"{shard}.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one entry of the store is made of, and what its code was made from; nothing in it is run.

    Making one raises `ManifestError` where a name is not allowed, so that all are safe in paths.

    kind: "program" (a whole model), "piece" (one compiled piece, shared by ranks).
    key, shard: the entry's name; the key is 64 hexadecimal digits (see `key_of`), the shard "rank0.<variant>", "piece".
    model: which model, for people.
    created: unix time in seconds.
    platform: where the code can run, such as "linux-x86_64 cuda sm_90".
    factors: everything the key was made of, by name; of what belongs to a program, "program" is that one's key.
    members: the entry's blobs by name, such as "bytecode" or "piece/0/(1, 256)".
    """

    kind: str
    key: str
    shard: str
    model: str
    created: float
    platform: str
    factors: dict[str, str]
    members: dict[str, Blob]

    def __post_init__(self) -> None:
        manifest_names(self.key, self.shard)
        for name in self.members:
            if len(name) > 200 or not is_plain_path(name):
                raise ManifestError(f"member {name!r} is not allowed: a relative path of up to 200 characters is")

    @property
    def names(self) -> tuple[str, ...]:
        """Where it lies in a store."""
        return manifest_names(self.key, self.shard)


class Store:
    """A store below the folder `root`; `open` makes one.

    tree: its files.  jit: the folder of kernel compilers' caches (kernels.py).
    writable: False when it can only be read (a read-only mount, another user's folder).
    max_bytes: what its entries may take, None for no limit; who has written keeps it (`evict.keep_limit`).
    """

    def __init__(self, root: Path, max_bytes: int | None, *, writable: bool) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.writable = writable
        self.tree = Tree(root)
        self.jit = self.tree.jit
        self._told: set[Path] = set()  # manifests that a warning named

    @classmethod
    def open(cls, root: Path, max_bytes: int | None = None) -> Store:
        """The store below `root`, made where there is none.  Raises `UnsafeStoreError` when others can write it."""
        store = cls(root.expanduser().absolute(), max_bytes, writable=True)
        why = ""
        for room in ROOMS:
            try:
                with store.tree.folder(room, make=True) as folder:
                    store.writable &= is_writable(folder)
            except OSError as error:
                store.writable = False
                if isinstance(error, PermissionError):
                    why = f" ({error.filename}: {error.strerror})"
        if not store.writable:
            logger.info("the store %s cannot be written by user %d: it is only read%s", store.root, os.geteuid(), why)
        return store

    def path(self, found: Blob | Manifest) -> Path:
        """The file of a blob or a manifest, for people."""
        return self.tree.path.joinpath(*found.names)

    def find(self, key: str, shard: str) -> Manifest | None:
        """The manifest of an entry.  A damaged one, or one of another format, counts as none: one warning names it.

        Its blobs are not looked at.  Raises `ManifestError` when `key` or `shard` is not allowed.
        """
        names = manifest_names(key, shard)
        try:
            return self._load(*names)
        except MissingError:
            return None
        except DamagedError as error:
            if error.path not in self._told:
                logger.warning("%s; it is not used", error)
            self._told.add(error.path)
            return None

    def variants(self, key: str, shard: str) -> list[Manifest]:
        """The manifests of an entry whose shards are `shard` and a suffix after a dot, the last used first."""
        folder = manifest_names(key, shard)[:-1]
        names = [name.removesuffix(".json") for name in self.tree.names(*folder) if name.endswith(".json")]
        found = (self.find(key, name) for name in names if name.startswith(f"{shard}.") and re.fullmatch(_SHARD, name))
        return sorted(filter(None, found), key=self.used, reverse=True)

    def files(self) -> list[tuple[str, ...]]:
        """Where the manifests lie, whether they can be read or not."""
        keys = self.tree.names("manifests")
        places = [("manifests", key, name) for key in keys for name in self.tree.names("manifests", key)]
        return [place for place in places if place[-1].endswith(".json")]

    def manifests(self) -> Iterator[Manifest]:
        """All that can be read; `verify` tells about the others."""
        for names in self.files():
            with suppress(DamagedError):
                yield self._load(*names)

    def _load(self, *names: str) -> Manifest:
        path = self.tree.path.joinpath(*names)
        try:
            manifest = unseal(self.tree.read(*names, most=MANIFEST_MAX), Manifest)
        except ManifestError as error:
            raise DamagedError(path, str(error)) from error
        if manifest.names != names:
            raise DamagedError(path, f"is the manifest of another entry, {manifest.key}/{manifest.shard}")
        return manifest

    def used(self, manifest: Manifest) -> float:
        """When an entry was used last, unix time; 0 when it is gone."""
        try:
            return self.tree.stat(*manifest.names).st_mtime
        except OSError:
            return 0.0

    def get(self, blob: Blob) -> bytes:
        """The bytes of `blob`, with the right digest.  Raises `DamagedError`, also when they are missing."""
        data = self.tree.read(*blob.names, size=blob.size)
        if digest(data) != blob.digest:
            raise DamagedError(self.path(blob), "is corrupt: its digest does not match")
        return data

    def put(self, data: bytes) -> Blob:
        """Keep `data`; what is there and whole is not written again, what is damaged is replaced by a new file.

        Call it within `writer`: others may be removed.  Raises `OSError` as it comes (full disk, read-only), and then
        leaves nothing.
        """
        blob = Blob(digest(data), len(data))
        try:
            self.get(blob)
        except DamagedError:
            self.tree.write(*blob.names, data=data)
        else:
            with suppress(OSError), self.tree.folder(*blob.names[:-1]) as folder:
                os.utime(blob.digest, dir_fd=folder, follow_symlinks=False)  # still wanted, though no entry may say so
        return blob

    def add(self, manifest: Manifest) -> None:
        """Make `manifest` the one of its key and shard in one step, after all its blobs were `put`.

        Raises `OSError` as it comes, and then leaves what was there.
        """
        self.tree.write(*manifest.names, data=seal(manifest))

    def commit(self, manifest: Manifest) -> None:
        """`add` a manifest, and `use` it."""
        self.add(manifest)
        self.use(manifest)

    @contextmanager
    def writer(self, key: str, timeout: float) -> Iterator[bool]:
        """Wait until nobody else writes `key`, at most `timeout` seconds.

        True: this process is the one writer; look again whether there still is something to write.  False: the wait was
        over the bound, or the store cannot be written.  No blobs are removed meanwhile.
        """
        manifest_names(key, "any")
        end = time.monotonic() + timeout
        if not self.writable:
            yield False
            return
        with ExitStack() as held:
            try:
                mine = held.enter_context(self.tree.lock(key, exclusive=True, timeout=timeout))
                if not mine and timeout > 0:  # else it was only asked
                    line = "another process has been writing %s for over %g s: not waiting for it"
                    logger.warning(line, key, timeout)
                # Afterwards: who waits for a key must not keep unneeded blobs from being removed.
                left = end - time.monotonic()
                mine &= held.enter_context(self.tree.lock("store", exclusive=False, timeout=left))
            except (OSError, UnsafeStoreError) as error:
                mine = False
                logger.warning("the store %s cannot be locked: %s", self.root, error)
            yield mine

    def use(self, manifest: Manifest) -> None:
        """Mark the entry as used now, and as in use until this process ends: meanwhile nothing evicts it."""
        with suppress(OSError, UnsafeStoreError):
            self.tree.hold(*manifest.names)

    def verify(self) -> list[DamagedError]:
        """Everything that is damaged or missing: manifests, their blobs, and blobs that no manifest names."""
        problems: list[DamagedError] = []
        needed: dict[str, Blob] = {}
        for names in self.files():
            try:
                needed |= {blob.digest: blob for blob in self._load(*names).members.values()}
            except DamagedError as error:
                problems.append(error)
        there = {name: Blob(name, status.st_size) for name, status in self.blobs().items()}
        for name, blob in sorted((there | needed).items()):
            try:
                self.get(blob)
            except DamagedError as error:
                if name in needed or not isinstance(error, MissingError):  # else just removed, needed by none
                    problems.append(error)
        return problems

    def blobs(self) -> dict[str, os.stat_result]:
        """The files of all blobs by digest, whether a manifest names them or not."""
        found = {}
        for start in self.tree.names("blobs"):
            for name in self.tree.names("blobs", start):
                # Not a file that NFS keeps for one who still reads it (.nfs0123).
                if re.fullmatch(_DIGEST, name) and name.startswith(start):
                    with suppress(OSError):
                        found[name] = self.tree.stat("blobs", start, name)
        return found

    def size(self) -> int:
        """Bytes of all blobs and manifests."""
        found = sum(status.st_size for status in self.blobs().values())
        for names in self.files():
            with suppress(OSError):
                found += self.tree.stat(*names).st_size
        return found
