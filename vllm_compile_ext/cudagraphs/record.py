"""What is known of a model's graphs from earlier starts: a small file in the store, one for each model and rank."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from vllm_compile_ext.artifacts import files
from vllm_compile_ext.artifacts.layout import Layout

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT = 200


class Used(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Batches that ran, or would have run, on the graph `number` of the model's shapes."""

    number: int
    batches: int


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """held: bytes that the graphs of the last start took.  graphs: how many they were.  needed: bytes for all shapes,
    from what those took.  used: which shapes traffic asked for, in all starts so far."""

    format: int = FORMAT
    held: int
    graphs: int
    needed: int
    used: list[Used]


def key_of(parts: Sequence[object]) -> str:
    """The name of a record: `parts` are what graphs depend on."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


def read(root: Path, key: str) -> Record | None:
    """The record of `key` in the store `root`; None where there is none to be read."""
    with suppress(files.DamagedError, msgspec.MsgspecError, ValueError, RecursionError):
        found = msgspec.json.decode(files.read(_path(root, key)), type=Record)
        if found.format == FORMAT and min(found.held, found.graphs, found.needed) >= 0:
            return found
    return None


def write(root: Path, key: str, record: Record) -> None:
    """Replace the record of `key`, and drop the oldest beyond `KEPT`.  Raises `OSError`."""
    files.write(_path(root, key), msgspec.json.encode(record), Layout(root).tmp)
    with suppress(OSError):
        paths = sorted(_path(root, key).parent.glob("*.json"), key=lambda p: p.stat().st_mtime)
        for path in paths[:-KEPT]:
            path.unlink(missing_ok=True)


def _path(root: Path, key: str) -> Path:
    return Layout(root).graphs / f"{key}.json"
