"""The last cache misses of a store, for `vllm-compile-ext explain miss`.

Numbered files, so that neither a clock set back nor ranks that miss at the same time lose one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from vllm_compile_ext.artifacts import files
from vllm_compile_ext.artifacts.key import Change
from vllm_compile_ext.artifacts.layout import Layout

FORMAT = 1
KEPT = 20

_NAME = re.compile(r"([0-9]{12})-[0-9]+\.json")


class Miss(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that was looked for and not found.

    time: unix seconds.  factors: everything the wanted `key` was made of.
    closest, changes: the key of the closest entry and what differs, as `key.closest` found them; None when nothing was
    stored.
    """

    format: int = FORMAT
    time: float
    key: str
    shard: str
    model: str
    factors: dict[str, str]
    closest: str | None
    changes: list[Change] | None


def record(
    layout: Layout,
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
    old = _numbered(layout)
    number = old[0][0] + 1 if old else 0
    # With the process in the name, ranks that take the same number keep one each.
    path = layout.misses / f"{number:012d}-{os.getpid()}.json"
    files.write(path, msgspec.json.encode(miss), layout.tmp)
    for _, path in old[KEPT - 1 :]:
        with suppress(OSError):
            path.unlink()


def read(layout: Layout) -> list[Miss]:
    """The misses that are kept, newest first; damaged ones and those of other formats are left out."""
    found = []
    for _, path in _numbered(layout):
        with suppress(files.DamagedError, msgspec.MsgspecError, ValueError, RecursionError):
            miss = msgspec.json.decode(files.read(path), type=Miss)
            if miss.format == FORMAT:
                found.append(miss)
    return found


def _numbered(layout: Layout) -> list[tuple[int, Path]]:
    """Number and path of each file, newest first."""
    names = [(path, _NAME.fullmatch(path.name)) for path in layout.misses.glob("*.json")]
    return sorted(((int(match[1]), path) for path, match in names if match), reverse=True)
