"""The last cache misses of a store, for `vllm-compile-ext explain miss`.

Numbered files, so that neither a clock set back nor ranks that miss at the same time lose one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec

from vllm_compile_ext.key.miss import Change
from vllm_compile_ext.store.files import DamagedError, Tree
from vllm_compile_ext.store.store import ManifestError, seal, unseal

FORMAT = 2
KEPT = 20

_NAME = re.compile(r"[0-9]{12}-[0-9]+\.json")


class Miss(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that was looked for and not found.

    time: unix seconds.  factors: everything the wanted `key` was made of.
    closest, changes: the key of the closest entry and what differs, as `key.closest` found them; None when nothing was
    stored.
    """

    time: float
    key: str
    shard: str
    model: str
    factors: dict[str, str]
    closest: str | None
    changes: list[Change] | None


def record(
    tree: Tree,
    key: str,
    shard: str,
    model: str,
    factors: Mapping[str, str],
    closest_key: str | None,
    changes: Sequence[Change] | None,
) -> None:
    """Keep a miss, and of all the last `KEPT`.  Raises `OSError` as it comes; a miss that is not kept does no harm."""
    miss = Miss(
        time=time.time(),
        key=key,
        shard=shard,
        model=model,
        factors=dict(factors),
        closest=closest_key,
        changes=None if closest_key is None else list(changes or ()),
    )
    old = _names(tree)
    number = int(old[0].partition("-")[0]) + 1 if old else 0
    # With the process in the name, ranks that take the same number keep one each.
    tree.write("misses", f"{number:012d}-{os.getpid()}.json", data=seal(miss, FORMAT))
    for name in old[KEPT - 1 :]:
        tree.remove("misses", name)


def read(tree: Tree) -> list[Miss]:
    """The misses that are kept, newest first; damaged ones and those of other formats are left out."""
    found = []
    for name in _names(tree):
        with suppress(DamagedError, ManifestError):
            found.append(unseal(tree.read("misses", name), Miss, FORMAT))
    return found


def _names(tree: Tree) -> list[str]:
    """Of the files, newest first."""
    return [name for name in reversed(tree.names("misses")) if _NAME.fullmatch(name)]
