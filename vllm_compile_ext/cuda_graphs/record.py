"""What is known of a model's graphs from earlier starts: a small file in the store, one for each model and rank.

It is sealed: with a wrong number in it, a server could have too little memory left to start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from vllm_compile_ext.store.files import DamagedError, Tree
from vllm_compile_ext.store.store import ManifestError, seal, unseal

FORMAT = 3
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


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    record: Record


def key_of(parts: Sequence[object]) -> str:
    """The name of a record: `parts` are what graphs depend on."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


def read(root: Path, key: str) -> Record | None:
    """The record of `key` in the store `root`; None where there is none to be read."""
    with suppress(DamagedError, ManifestError):
        found = unseal(Tree(root).read("graphs", f"{key}.json"), _Named, FORMAT)
        return found.record if found.key == key else None
    return None


def write(root: Path, key: str, record: Record) -> None:
    """Replace the record of `key`, and drop the oldest beyond `KEPT`.

    Raises `OSError`, and `UnsafeStoreError` when others can write the store.
    """
    tree = Tree(root)
    tree.write("graphs", f"{key}.json", data=seal(_Named(key, record), FORMAT))
    with suppress(OSError):
        names = sorted(tree.names("graphs"), key=lambda name: tree.stat("graphs", name).st_mtime)
        for name in names[:-KEPT]:
            tree.remove("graphs", name)
