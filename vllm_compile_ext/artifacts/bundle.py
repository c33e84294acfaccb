"""Bundles: entries of a store in one file, made in CI or a Docker build and put into the stores of other machines.

A bundle is an `archive` of

    index.json               what is in it: names, digests, sizes
    signature.json           an Ed25519 signature of the index's digest, or null
    manifests/KEY/SHARD      the files of the manifests
    blobs/DIGEST
    jit/NUMBER               the files of the store's `jit` folder, numbered as in the index

in this order.  The index says what has to follow, byte for byte: whatever else a tar archive could hold is refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from uuid import uuid4

import msgspec
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from vllm_compile_ext.artifacts import archive, files, jit_files, locks, manifest, sign
from vllm_compile_ext.artifacts.archive import ArchiveError
from vllm_compile_ext.artifacts.manifest import Blob, Manifest, ManifestError, digest
from vllm_compile_ext.artifacts.sign import Signature, SignError
from vllm_compile_ext.artifacts.store import Store

FORMAT = 1  # raised when a reader of the old one would misread the new one

INDEX_MAX = 64 << 20  # bytes of the index
WHOLE_MAX = 16 << 20  # bytes of a manifest, and of a kernel file that is changed while it is unpacked
MEMBERS_MAX = 100_000  # manifests, blobs and kernel files together
TOTAL_MAX = (8 << 30) - 1  # bytes of all of them: a single one can have no more in a tar archive

_WAIT = 60.0  # seconds for another process to be done with removing blobs


class BundleError(RuntimeError):
    """A bundle that cannot be made or is refused; the message names the file, what is wrong and the way out."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest in a bundle: the key and shard that it is for, digest and size of its file."""

    key: str
    shard: str
    file: Blob

    def __post_init__(self) -> None:
        manifest.check_key(self.key)
        manifest.check_shard(self.shard)

    @property
    def name(self) -> str:
        return f"manifests/{self.key}/{self.shard}"


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel file in a bundle: its digest and size, and when it was written, in unix nanoseconds."""

    file: Blob
    written: int

    def __post_init__(self) -> None:
        if not 0 <= self.written < 1 << 62:
            raise ManifestError(f"time {self.written} is not allowed")


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in a bundle.  Making one raises `ManifestError` where a name is not allowed or there is too much.

    platform: where the code can run, the same for all entries.  jit: the kernel files by path.
    """

    format: int = FORMAT
    platform: str
    manifests: list[Entry]
    blobs: list[Blob]
    jit: dict[str, Kernel]

    def __post_init__(self) -> None:
        if not self.manifests:
            raise ManifestError("no entry")
        if not self.platform.isprintable() or len(self.platform) > 200:
            raise ManifestError(f"platform {self.platform!r} is not allowed: up to 200 printable characters are")
        if len({entry.name for entry in self.manifests}) < len(self.manifests):
            raise ManifestError("an entry is named twice")
        if len({blob.digest for blob in self.blobs}) < len(self.blobs):
            raise ManifestError("a blob is named twice")
        for path in self.jit:
            jit_files.check_path(path)
        if folders := self.jit.keys() & {str(folder) for path in self.jit for folder in PurePosixPath(path).parents}:
            raise ManifestError(f"{min(folders)!r} is a file and a folder")
        whole = [entry.file for entry in self.manifests]
        whole += [kernel.file for path, kernel in self.jit.items() if jit_files.is_group(path)]
        if (largest := max(blob.size for blob in whole)) > WHOLE_MAX:
            raise ManifestError(f"a manifest or kernel file of {largest} bytes, at most {WHOLE_MAX} are allowed")
        if self.members > MEMBERS_MAX or self.size > TOTAL_MAX:
            raise ManifestError(
                f"{self.members} members of {self.size} bytes in all, at most {MEMBERS_MAX} of {TOTAL_MAX} are allowed"
            )

    @property
    def members(self) -> int:
        return len(self.manifests) + len(self.blobs) + len(self.jit)

    @property
    def size(self) -> int:
        """Bytes of all members."""
        listed = [entry.file for entry in self.manifests] + [kernel.file for kernel in self.jit.values()]
        return sum(blob.size for blob in (*listed, *self.blobs))


class _Format(msgspec.Struct):
    format: int


class Bundle(msgspec.Struct, frozen=True):
    """What was packed or unpacked; signed_by: name of the key whose signature it has (see `sign.name`)."""

    index: Index
    signed_by: str | None


def pack(
    store: Store,
    out: Path,
    keys: Collection[str] | None = None,
    *,
    key: Ed25519PrivateKey | None = None,
    jit: bool = True,
) -> Bundle:
    """Write the entries with these `keys` (None: all that can be read) to the file `out`, signed with `key`.

    jit: whether the store's kernel files come along, all of them.  The same content gives the same bytes wherever the
    store is, the signature apart.  Raises `BundleError`, also when something is damaged, and `OSError` when `out`
    cannot be written; `out` is then left as it was.
    """
    entries = [entry for entry in store.manifests() if keys is None or entry.key in keys]
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
    try:
        index = _index(store, entries, jit=jit)
        signature = None if key is None else sign.sign(key, digest(msgspec.json.encode(index)))
        files.write(out, archive.pack(_members(store, entries, index, signature)), out.parent)
    except (files.DamagedError, ManifestError) as error:
        raise BundleError(f"{out} was not written: {error} (vllm-compile-ext cache verify says what to do)") from error
    return Bundle(index, None if signature is None else sign.name(signature.key))


def _index(store: Store, entries: Sequence[Manifest], *, jit: bool) -> Index:
    folder = store.layout.jit
    return Index(
        platform=entries[0].platform,
        manifests=[Entry(entry.key, entry.shard, _blob(manifest.encode(entry))) for entry in entries],
        blobs=sorted({blob for entry in entries for blob in entry.members.values()}, key=lambda blob: blob.digest),
        jit={path: _kernel(folder, path) for path in jit_files.paths(folder)} if jit else {},
    )


def _members(
    store: Store, entries: Sequence[Manifest], index: Index, signature: Signature | None
) -> Iterator[tuple[str, bytes]]:
    yield "index.json", msgspec.json.encode(index)
    yield "signature.json", msgspec.json.encode(signature)
    for listed, entry in zip(index.manifests, entries, strict=True):
        yield listed.name, manifest.encode(entry)
    for blob in index.blobs:
        yield f"blobs/{blob.digest}", store.get(blob)
    for number, (path, kernel) in enumerate(index.jit.items()):
        data = jit_files.read(store.layout.jit, path)
        if _blob(data) != kernel.file:
            raise files.DamagedError(store.layout.jit / path, "changed while it was packed")
        yield f"jit/{number}", data


def _kernel(folder: Path, path: str) -> Kernel:
    data = jit_files.read(folder, path)
    return Kernel(_blob(data), max(0, (folder / path).stat().st_mtime_ns))


def _blob(data: bytes) -> Blob:
    return Blob(digest(data), len(data))


def unpack(
    store: Store,
    file: Path,
    trust: Sequence[Ed25519PublicKey] = (),
    *,
    allow_unsigned: bool = False,
    platforms: Collection[str] | None = None,
) -> Bundle:
    """Put what is in the bundle `file` into the store, after all of it was checked.

    trust: whose signatures count; allow_unsigned: whether a bundle with none of theirs is unpacked too.
    platforms: those whose code is wanted, None for all.
    Raises `BundleError`, or `OSError` as it comes (full disk, read-only), and then the store has no entry of the bundle
    that it did not have before.
    """
    if not store.writable:
        raise BundleError(f"{file} was not unpacked: the store {store.root} cannot be written")
    with file.open("rb") as opened, locks.locked(store.layout.store_lock, exclusive=False, timeout=_WAIT) as shared:
        if not shared:
            raise BundleError(f"{file} was not unpacked: another process is removing things from {store.root}")
        try:
            source = _Source(archive.Reader(opened))
            index, signed_by = _open(source, trust, allow_unsigned=allow_unsigned, platforms=platforms)
            _fill(store, source, index)
        except (ArchiveError, SignError) as error:
            raise BundleError(f"{file} {error}; nothing of it was unpacked") from error
    return Bundle(index, signed_by)


class _Source:
    """The members of an archive, one after the other.  All methods raise `ArchiveError`."""

    def __init__(self, reader: archive.Reader) -> None:
        self._reader = reader
        self.end = reader.end

    def head(self, name: str, limit: int) -> bytes:
        """The next member, of which only the name is known and that it has at most `limit` bytes."""
        found, size = self._reader.header()
        if found != name or size > limit:
            raise ArchiveError(
                f"has a member {found!r} of {size} bytes where {name!r} of at most {limit} bytes belongs"
            )
        return b"".join(self._reader.parts(size))

    def parts(self, name: str, blob: Blob) -> Iterator[bytes]:
        """The next member, which has to be `blob`; that it was is certain at the end of the iteration."""
        found, size = self._reader.header()
        if (found, size) != (name, blob.size):
            raise ArchiveError(f"has a member {found!r} of {size} bytes where {name!r} of {blob.size} bytes belongs")
        seen = blake3()
        for part in self._reader.parts(size):
            seen.update(part)
            yield part
        if seen.hexdigest() != blob.digest:
            raise ArchiveError(f"is corrupt: the digest of {name!r} does not match")


def _open(
    source: _Source, trust: Sequence[Ed25519PublicKey], *, allow_unsigned: bool, platforms: Collection[str] | None
) -> tuple[Index, str | None]:
    """The index, and the name of the key that signed it, when both may be used."""
    data = source.head("index.json", INDEX_MAX)
    signed = source.head("signature.json", 1000)
    # Before anything else looks at the index.
    signed_by = _authorize(signed, digest(data), trust, allow_unsigned=allow_unsigned)
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise ArchiveError(
                f"was written in format {found}, this version reads {FORMAT}: use the vllm-compile-ext it was made with"
            )
        index = msgspec.json.decode(data, type=Index)
    except ArchiveError:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ArchiveError(f"has an index that is not allowed ({error})") from error
    if platforms is not None and index.platform not in platforms:
        here = " or ".join(sorted(platforms))
        raise ArchiveError(f"is for {index.platform}, this machine is {here}: for another one use --any-platform")
    return index, signed_by


def _authorize(
    signed: bytes, index_digest: str, trust: Sequence[Ed25519PublicKey], *, allow_unsigned: bool
) -> str | None:
    try:
        signature = msgspec.json.decode(signed, type=Signature | None)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ArchiveError(f"has a signature that cannot be read ({error})") from error
    if signature is None:
        if not allow_unsigned:
            raise ArchiveError(
                "is not signed, and what is in it would be run: get a signed one, or use --allow-unsigned if you know "
                "who made it"
            )
        return None
    name = sign.name(signature.key)
    if not sign.check(signature, index_digest, trust) and not allow_unsigned:
        trusted = ", ".join(map(sign.name, trust)) or "none"
        raise ArchiveError(
            f"is signed by key {name}, which is not trusted (trusted: {trusted}), and what is in it would be run: "
            "name the key's file with --trust, or use --allow-unsigned if you know who made it"
        )
    return name


def _fill(store: Store, source: _Source, index: Index) -> None:
    layout = store.layout
    staged: dict[Path, Path] = {}  # the place of a file in the store, the checked file in `tmp`

    def stage(place: Path, parts: Iterable[bytes]) -> None:
        path = layout.tmp / f"unpack-{uuid4().hex}"
        files.write(path, parts, layout.tmp)
        staged[place] = path

    try:
        for entry in index.manifests:
            data = b"".join(source.parts(entry.name, entry.file))
            # Another file in the place of an equal manifest that is in use would not be in use.
            if store.find(entry.key, entry.shard) != _manifest(data, entry, index):
                stage(layout.manifest(entry.key, entry.shard), (data,))
        for blob in index.blobs:
            stage(layout.blob(blob), source.parts(f"blobs/{blob.digest}", blob))
        for number, (path, kernel) in enumerate(index.jit.items()):
            place = layout.jit / path
            parts = source.parts(f"jit/{number}", kernel.file)
            stage(place, (jit_files.placed(b"".join(parts), place.parent),) if jit_files.is_group(path) else parts)
            os.utime(staged[place], ns=(time.time_ns(), kernel.written))
        source.end()
        _move(staged, {layout.manifest(entry.key, entry.shard) for entry in index.manifests})
    finally:
        for left in staged.values():
            with suppress(OSError):
                left.unlink()


def _manifest(data: bytes, entry: Entry, index: Index) -> Manifest:
    """What the manifest's file `data` says, when it agrees with the index."""
    try:
        found = manifest.decode(data)
    except ManifestError as error:
        raise ArchiveError(f"has a member {entry.name!r} that {error}") from error
    if (found.key, found.shard) != (entry.key, entry.shard):
        raise ArchiveError(f"has the manifest of another entry as {entry.name!r}")
    if found.platform != index.platform:
        raise ArchiveError(f"has a member {entry.name!r} for {found.platform!r}, but says it is for {index.platform!r}")
    if missing := set(found.members.values()) - set(index.blobs):
        raise ArchiveError(f"lacks {len(missing)} blobs of {entry.name!r}")
    return found


def _move(staged: dict[Path, Path], manifests: set[Path]) -> None:
    """Move the files to their places, those of the manifests last; all of these or none."""
    moved: list[Path] = []
    try:
        for place in sorted(staged, key=lambda place: place in manifests):
            files.move(staged[place], place)
            moved.append(place)
    except BaseException:
        for place in manifests.intersection(moved):
            with suppress(OSError):
                place.unlink()
        raise
