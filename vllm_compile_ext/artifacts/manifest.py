"""A manifest: what one entry of the store is made of, and what its code was made from.  JSON; nothing in it is run.

On disk it is ``{"format": 2, "seal": "<blake3 of the next value's bytes>", "manifest": {...}}``: one flipped bit and it
is damaged.  Every `Manifest` and `Blob` is checked when it is made, decoded or not, so that their names are safe in
paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
from blake3 import blake3

FORMAT = 2  # raised when a reader of the old one would misread the new one

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


class ManifestError(ValueError):
    """Not a manifest, a damaged one, or one with names that are not allowed; the message says what."""


class FormatError(ManifestError):
    """A manifest of another format than `FORMAT`."""


def digest(data: bytes) -> str:
    """blake3 of `data`, 64 lower hexadecimal digits."""
    return blake3(data).hexdigest()


def check_key(key: str) -> None:
    """Raises `ManifestError` unless `key` is 64 lower hexadecimal digits."""
    if not _DIGEST.fullmatch(key):
        raise ManifestError(f"key {key!r} is not allowed: 64 lower hexadecimal digits are")


def check_shard(shard: str) -> None:
    """Raises `ManifestError` unless `shard` is a plain name, such as "rank0"."""
    if not _SHARD.fullmatch(shard) or ".." in shard:
        raise ManifestError(f"shard {shard!r} is not allowed: up to 100 letters, digits and _.- are, without '..'")


def _check_member(name: str) -> None:
    steps = name.split("/")
    if not name.isprintable() or "\\" in name or len(name) > 200 or any(step in ("", ".", "..") for step in steps):
        raise ManifestError(f"member {name!r} is not allowed: up to 200 printable characters are, as a relative path")


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some bytes of the store, by their blake3 `digest` (64 lower hexadecimal digits) and `size` in bytes."""

    digest: str
    size: int

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise ManifestError(f"digest {self.digest!r} is not allowed: 64 lower hexadecimal digits are")
        if self.size < 0:
            raise ManifestError(f"size {self.size} is not allowed: a number from 0 is")


def total(blobs: Iterable[Blob]) -> int:
    """Bytes of `blobs`, each counted once."""
    return sum(blob.size for blob in {blob.digest: blob for blob in blobs}.values())


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the store.  Making one raises `ManifestError` where a name is not allowed.

    kind: "program" (a whole model) or "piece" (one compiled piece, shared by ranks).
    key, shard: the entry's name; the key is 64 hexadecimal digits (see `key.key_of`), the shard "rank0.<variant>",
    "piece", ...
    model: which model, for people.
    created: unix time in seconds.
    platform: where the code can run, such as "linux-x86_64 cuda sm_90".
    factors: everything the key was made of, by name.
    members: the entry's blobs by name, such as "bytecode" or "piece/0/(1, 256)".
    """

    format: int = FORMAT
    kind: str
    key: str
    shard: str
    model: str
    created: float
    platform: str
    factors: dict[str, str]
    members: dict[str, Blob]

    def __post_init__(self) -> None:
        check_key(self.key)
        check_shard(self.shard)
        for name in self.members:
            _check_member(name)


class _Format(msgspec.Struct):
    format: int


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    seal: str
    manifest: msgspec.Raw


def encode(manifest: Manifest) -> bytes:
    """The bytes of a manifest's file."""
    inner = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Sealed(manifest.format, digest(inner), msgspec.Raw(inner)))


def decode(data: bytes) -> Manifest:
    """The manifest of which `data` is the file.  Raises `ManifestError`, or its subclass `FormatError`."""
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise FormatError(f"was written in format {found}, this version reads {FORMAT}")
        sealed = msgspec.json.decode(data, type=_Sealed)
        if digest(bytes(sealed.manifest)) != sealed.seal:
            raise ManifestError("is corrupt: its digest does not match")
        return msgspec.json.decode(sealed.manifest, type=Manifest)
    except ManifestError:
        raise
    # msgspec raises RecursionError on deep nesting, and ValueError where text is not UTF-8.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestError(f"is no manifest ({error})") from error
