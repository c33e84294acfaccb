"""What is known of a model's graphs from earlier starts: a small file in the store, one for each model and rank.

On disk it is ``{"format": 2, "seal": "<digest of the key and the next value's bytes>", "record": {...}}``: with a wrong
number in it, a server could have too little memory left to start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from vllm_compile_ext.artifacts import access, files
from vllm_compile_ext.artifacts.access import UnsafeStoreError
from vllm_compile_ext.artifacts.layout import Layout

FORMAT = 2
KEPT = 200

_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Used(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Batches that ran, or would have run, on the graph `number` of the model's shapes."""

    number: _Number
    batches: _Number


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """base: bytes that the last start took for all graphs before the first.  held: bytes that its graphs took.  graphs:
    how many they were.  each: bytes of one, by kind.  needed: bytes for the graphs of the next start, from what those
    took.  used: which shapes traffic asked for, in all starts so far."""

    base: _Number
    held: _Number
    graphs: _Number
    each: dict[str, _Number]
    needed: _Number
    used: list[Used]


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    seal: str
    record: msgspec.Raw


def key_of(parts: Sequence[object]) -> str:
    """The name of a record: `parts` are what graphs depend on."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


def read(root: Path, key: str) -> Record | None:
    """The record of `key` in the store `root`; None where there is none to be read."""
    with suppress(UnsafeStoreError, files.DamagedError, msgspec.MsgspecError, ValueError, RecursionError):
        _check(root)
        found = msgspec.json.decode(files.read(_path(root, key)), type=_Sealed)
        if found.format == FORMAT and found.seal == _seal(key, bytes(found.record)):
            return msgspec.json.decode(found.record, type=Record)
    return None


def write(root: Path, key: str, record: Record) -> None:
    """Replace the record of `key`, and drop the oldest beyond `KEPT`.

    Raises `OSError`, and `UnsafeStoreError` when others can write the store.
    """
    _check(root)
    files.write(_path(root, key), _sealed(key, msgspec.json.encode(record)), Layout(root).tmp)
    with suppress(OSError):
        paths = sorted(_path(root, key).parent.glob("*.json"), key=lambda p: p.stat().st_mtime)
        for path in paths[:-KEPT]:
            path.unlink(missing_ok=True)


def _check(root: Path) -> None:
    for folder in (root, Layout(root).v1, Layout(root).graphs):
        access.check(folder, root)


def _sealed(key: str, inner: bytes, made: int = FORMAT) -> bytes:
    """The bytes of a record's file."""
    return msgspec.json.encode(_Sealed(made, _seal(key, inner), msgspec.Raw(inner)))


def _seal(key: str, inner: bytes) -> str:
    return hashlib.sha256(key.encode() + inner).hexdigest()


def _path(root: Path, key: str) -> Path:
    return Layout(root).graphs / f"{key}.json"
