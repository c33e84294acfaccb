"""Bundles: entries of a store in one file, made in CI or a Docker build and put into the stores of other machines.

A bundle is a gzipped tar archive of a store (``v1/manifests``, ``v1/blobs`` and the kernels in ``v1/jit``) and a footer
that says who signed the bytes before it.  Nothing is opened before the signature holds.  Then it is unpacked into a
private folder and read as what it is, a store, with a store's own checks.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import tarfile
import time
import zlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from vllm_compile_ext.store import evict, kernels
from vllm_compile_ext.store.files import DamagedError, UnsafeStoreError
from vllm_compile_ext.store.store import Blob, Manifest, Store, seal

# The footer is these, 32 bytes of the signer's public key and 64 of the signature; zeros where nobody signed.
MAGIC = b"vllm-compile-ext bundle 2\n"
FOOTER = len(MAGIC) + 32 + 64
_SIGNED = b"vllm-compile-ext bundle "  # before the digest that is signed: the key may sign other things, too

UNLIMITED = 64 << 30  # bytes that are unpacked into a store without a limit
FILES_MAX = 100_000

_PART = 1 << 20  # bytes read at a time, and what a header may make tarfile read at once
_WAIT = 60.0  # seconds for another process to be done with removing blobs
_PLACES = re.compile(r"v1/(manifests/[^/]+/[^/]+\.json|blobs/[^/]+/[^/]+|jit/[^/]+/[^/]+/.+)", re.DOTALL)
_UNREADABLE = (  # what tarfile and gzip raise for bytes that nobody packed
    *(tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, ValueError, OverflowError, RecursionError),
    *(FileExistsError, NotADirectoryError, IsADirectoryError),
)


class BundleError(RuntimeError):
    """A bundle that cannot be made or is refused; the message names the file, what is wrong and the way out."""


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """What was packed or unpacked.

    signed_by: name of the key that signed it (see `key_name`).  size: bytes of its blobs.  kept: "key/shard" of each
    entry that was not unpacked, because what the store has was made later.
    """

    platform: str
    keys: list[str]
    blobs: int
    jit_files: int
    size: int
    signed_by: str | None
    kept: list[str] = []


def pack(
    store: Store,
    out: Path,
    keys: Collection[str] | None = None,
    *,
    key: Ed25519PrivateKey | None = None,
    jit: bool = True,
) -> Bundle:
    """Write the entries with these `keys`, and what belongs to them (None: all that can be read), to the file `out`,
    signed with `key`.

    jit: whether the store's kernel files come along, all of them.  The same content gives the same bytes wherever the
    store is.  Raises `BundleError`, also when something is damaged, and `OSError` when `out` cannot be written; it is
    then left as it was.
    """
    entries = [m for m in store.manifests() if keys is None or m.key in keys or m.factors.get("program") in keys]
    if missing := set(keys or ()) - {entry.key for entry in entries}:
        raise BundleError(f"{store.root} has no entry {min(missing)} that can be read")
    if not entries:
        raise BundleError(f"there is nothing to pack in {store.root}: fill it by starting vLLM")
    if len(platforms := sorted({entry.platform for entry in entries})) > 1:
        raise BundleError(
            f"these entries are for {' and '.join(platforms)}, a bundle is for one platform: name the keys of one"
        )
    if out.exists() and not out.is_file():
        raise BundleError(f"{out} is not a regular file")
    paths = list(kernels.paths(store.jit)) if jit else []
    written = out.with_name(f".{out.name}.{uuid4().hex}")
    try:
        with written.open("x+b") as file:
            with (
                gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                for entry in entries:
                    _add(tar, entry.names, seal(entry))
                for _, blob in sorted(_blobs(entries).items()):
                    _add(tar, blob.names, store.get(blob))
                for path in paths:
                    data = kernels.relocated(path, (store.jit / path).read_bytes(), None)
                    when = (store.jit / path).stat().st_mtime if path.startswith("flashinfer/") else 0
                    _add(tar, ("jit", path), data, when)
            file.seek(0)
            algorithm: Any = blake3
            digest = hashlib.file_digest(file, algorithm).digest()
            public = bytes(32) if key is None else key.public_key().public_bytes_raw()
            file.write(MAGIC + public + (bytes(64) if key is None else key.sign(_SIGNED + digest)))
            file.flush()
            os.fsync(file.fileno())
        written.replace(out)
    except DamagedError as error:
        raise BundleError(f"{out} was not written: {error} (vllm-compile-ext cache verify says what to do)") from error
    finally:
        written.unlink(missing_ok=True)
    return _summary(entries, len(paths), None if key is None else key_name(key.public_key()))


def _add(tar: tarfile.TarFile, names: Sequence[str], data: bytes, when: float = 0) -> None:
    info = tarfile.TarInfo("/".join(("v1", *names)))
    info.size, info.mode, info.mtime = len(data), 0o600, int(when)
    tar.addfile(info, io.BytesIO(data))


def _blobs(entries: Sequence[Manifest]) -> dict[str, Blob]:
    return {blob.digest: blob for entry in entries for blob in entry.members.values()}


def _summary(
    entries: Sequence[Manifest], jit_files: int, signed_by: str | None, kept: Sequence[Manifest] = ()
) -> Bundle:
    blobs = _blobs(entries)
    return Bundle(
        platform=entries[0].platform,
        keys=sorted({entry.key for entry in entries}),
        blobs=len(blobs),
        jit_files=jit_files,
        size=sum(blob.size for blob in blobs.values()),
        signed_by=signed_by,
        kept=[f"{entry.key}/{entry.shard}" for entry in kept],
    )


def unpack(
    store: Store,
    file: Path,
    trust: Sequence[Ed25519PublicKey] = (),
    *,
    allow_unsigned: bool = False,
    platforms: Collection[str] | None = None,
    replace: bool = False,
) -> Bundle:
    """Put what is in the bundle `file` into the store, after all of it was checked.

    trust: whose signatures count; allow_unsigned: whether a bundle with none of theirs is unpacked too.
    platforms: those whose code is wanted, None for all.  replace: also what the store has a newer one of.
    Raises `BundleError`, or `OSError` as it comes (full disk, read-only); each entry is then the old or the new one.
    """
    if not store.writable:
        raise BundleError(f"{file} was not unpacked: the store {store.root} cannot be written")
    limit = UNLIMITED if store.max_bytes is None else store.max_bytes
    name = f"unpack-{uuid4().hex}"
    folder = store.tree.path / "tmp" / name
    try:
        with store.tree.folder("tmp", name, make=True):
            signed_by = _copy(file, folder / "bundle", trust, allow_unsigned=allow_unsigned, limit=limit)
            _extract(folder, limit)
            source = Store(folder, None, writable=False)
            entries, paths = _checked(source, platforms)
            with store.tree.lock("store", exclusive=False, timeout=_WAIT) as shared:
                if not shared:
                    raise _RefusedError(f"cannot be unpacked now: another process is removing things from {store.root}")
                kept = _fill(store, source, entries, paths, replace=replace)
        evict.keep_limit(store)
    except (_RefusedError, DamagedError, UnsafeStoreError) as error:
        raise BundleError(f"{file} {error}; nothing of it was unpacked") from error
    finally:
        store.tree.remove_folder("tmp", name, full=True)
    return _summary(entries, len(paths), signed_by, kept)


class _RefusedError(Exception):
    """The message continues a sentence that begins with the bundle's name."""


def _copy(file: Path, to: Path, trust: Sequence[Ed25519PublicKey], *, allow_unsigned: bool, limit: int) -> str | None:
    """Copy the archive, which nobody can then change; returns the name of the key that signed it."""
    with file.open("rb") as opened, to.open("xb") as copy:
        found = os.fstat(opened.fileno())
        size = found.st_size - FOOTER
        if not stat.S_ISREG(found.st_mode) or size < 0:
            raise _RefusedError("is no bundle: it is too short, or not a regular file")
        if size > limit:
            raise _RefusedError(_say_limit(limit))
        seen, left = blake3(), size
        while left and (part := opened.read(min(_PART, left))):
            seen.update(part)
            left -= copy.write(part)
        footer = opened.read(FOOTER)
    if footer[: len(MAGIC)] != MAGIC:
        raise _RefusedError("is no bundle, is truncated, or was made by another version: pack it again with this one")
    public, signature = footer[len(MAGIC) : -64], footer[-64:]
    if not any(public + signature):
        if allow_unsigned:
            return None
        raise _RefusedError(
            "is not signed, and what is in it would be run: get a signed one, or use --allow-unsigned if you know who"
            " made it"
        )
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, _SIGNED + seen.digest())
    except (InvalidSignature, ValueError) as error:
        raise _RefusedError("was changed after it was signed: its signature does not match") from error
    if not (allow_unsigned or any(public == trusted.public_bytes_raw() for trusted in trust)):
        trusted = ", ".join(map(key_name, trust)) or "none"
        raise _RefusedError(
            f"is signed by key {key_name(key)}, which is not trusted (trusted: {trusted}), and what is in it would be "
            "run: name the key's file with --trust, or use --allow-unsigned if you know who made it"
        )
    return key_name(key)


class _Bounded:
    """The bytes of an archive for tarfile, which takes as many at once as a header says."""

    def __init__(self, file: gzip.GzipFile, limit: int) -> None:
        self._file, self._limit = file, limit
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > _PART or self.tell() > self._limit:
            raise _RefusedError(_say_limit(self._limit))
        return self._file.read(size)

    def seek(self, place: int) -> None:
        while (left := place - self.tell()) > 0 and self.read(min(_PART, left)):
            pass


def _extract(folder: Path, limit: int) -> None:
    """Unpack the archive ``bundle`` in `folder`: plain files with names of a store, of at most `limit` bytes in all."""
    if not hasattr(tarfile, "data_filter"):
        raise _RefusedError("needs Python 3.11.4 or newer, whose tarfile can be told to trust nothing")
    umask = os.umask(0o077)  # tarfile makes folders by it
    try:
        with gzip.open(folder / "bundle") as unpacked:
            bounded: Any = _Bounded(unpacked, 2 * limit + 1024 * FILES_MAX)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:
                left, count = limit, 0
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps all, with their headers
                    left, count = left - member.size, count + 1
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                        raise _RefusedError(f"has a member {member.name[:300]!r} that is no plain file")
                    if not _PLACES.fullmatch(member.name):
                        raise _RefusedError(f"has a member {member.name[:300]!r} that belongs into no store")
                    kernels.check_path(member.name)
                    if left < 0 or member.size < 0 or count > FILES_MAX:
                        raise _RefusedError(_say_limit(limit))
                    tar.extract(member, folder, filter="data")
            while bounded.read(_PART):  # gzip's own checksum comes last
                pass
    except _UNREADABLE as error:
        raise _RefusedError(f"is damaged ({error})") from error
    finally:
        os.umask(umask)


def _say_limit(limit: int) -> str:
    return f"holds more than the store may take: {limit} bytes (VLLM_COMPILE_STORE_MAX_GB) in {FILES_MAX} files"


def _checked(source: Store, platforms: Collection[str] | None) -> tuple[list[Manifest], list[str]]:
    """The entries and the kernel files of a store that was unpacked, all of which are whole."""
    if problems := source.verify():
        damaged = problems[0].path.relative_to(source.tree.path)
        raise _RefusedError(f"is damaged: {damaged}{str(problems[0]).removeprefix(str(problems[0].path))}")
    entries = list(source.manifests())
    made_for = sorted({entry.platform for entry in entries})
    if len(made_for) != 1:
        raise _RefusedError(f"has entries for {len(made_for)} platforms, one is needed")
    if platforms is not None and made_for[0] not in platforms:
        here = " or ".join(sorted(platforms))
        raise _RefusedError(f"is for {made_for[0]}, this machine is {here}: for another one use --any-platform")
    return entries, list(kernels.paths(source.tree.path / "jit"))


def _fill(
    store: Store, source: Store, entries: Sequence[Manifest], paths: Sequence[str], *, replace: bool
) -> list[Manifest]:
    """Move everything into `store`, the manifests last; returns those that are not wanted."""
    kept = [] if replace else [entry for entry in entries if _has_newer(store, entry)]
    wanted = [entry for entry in entries if entry not in kept]
    for blob in _blobs(wanted).values():
        store.put(source.get(blob))
    for path in paths:
        found, place = source.tree.path / "jit" / path, store.jit / path
        when = found.stat().st_mtime
        if replace or not place.exists() or place.stat().st_mtime < when:
            data = kernels.relocated(path, found.read_bytes(), place.parent)
            store.tree.write(store.jit.name, *path.split("/"), data=data)
            if when:
                os.utime(place, (time.time(), when))
    for entry in wanted:
        # Another file in the place of an equal manifest that is in use would not be in use.
        if store.find(entry.key, entry.shard) != entry:
            store.add(entry)
    return kept


def _has_newer(store: Store, entry: Manifest) -> bool:
    """Whether the store has a whole entry of this name that was made later."""
    mine = store.find(entry.key, entry.shard)
    if mine is None or mine.created <= entry.created:
        return False
    with suppress(DamagedError):
        return all(map(store.get, mine.members.values()))
    return False


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key in the PEM file `path`.  Raises `BundleError`, or `OSError` when it cannot be read."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except TypeError:
        raise BundleError(f"{path} is encrypted: decrypt it with openssl pkey -in {path} -out FILE") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BundleError(f"{path} holds no private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"{path} holds a key of another kind: make one with openssl genpkey -algorithm ed25519")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """The key in the PEM file `path`.  Raises `BundleError`, or `OSError` when it cannot be read."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BundleError(
            f"{path} holds no public key in PEM form: openssl pkey -in PRIVATE -pubout -out FILE writes one"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(f"{path} holds a key of another kind, not Ed25519")
    return key


def key_name(key: Ed25519PublicKey) -> str:
    """What people call a public key: its first hexadecimal digits."""
    return key.public_bytes_raw().hex()[:16]
