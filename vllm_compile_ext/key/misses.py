"""Why a start found no entry in the store: what differs from the closest one.  The last misses are kept in the store.

Factors are a flat table, name -> text, of everything that can change compiled code.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec

from vllm_compile_ext.harmless import HIDDEN, plain
from vllm_compile_ext.store.files import DamagedError, Tree
from vllm_compile_ext.store.store import Manifest, ManifestError, seal, unseal

FORMAT = 2
KEPT = 20

_WIDTH = 40  # characters of a value that fit into the line
_SHOWN = 3  # changes that fit into the line
# Numbered, so that a clock set back loses none; with the process's id, so that ranks which miss at the same time keep
# one each.
_NAME = re.compile(r"[0-9]{12}-[0-9]+\.json")


class Change(NamedTuple):
    """A factor that differs; None stands for a factor that is not there."""

    name: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        if self.old is None and self.new is None:  # the name says it all
            return plain(self.name)
        if str(self.old).startswith(HIDDEN) and str(self.new).startswith(HIDDEN):
            return plain(f"{self.name.removesuffix(':')} has another value")
        shown = [HIDDEN if str(value).startswith(HIDDEN) else value or "" for value in (self.old, self.new)]
        old, new = shorten(shown[0], shown[1])
        return plain(f"{self.name} {'unset' if self.old is None else old} -> {'unset' if self.new is None else new}")


class Miss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry that a start looked for and did not find.

    factors: everything the wanted `key` was made of.  closest, changes: the key of the closest entry and what differs;
    None when nothing was stored.  time: unix seconds.
    """

    key: str
    shard: str
    model: str
    factors: dict[str, str]
    closest: str | None
    changes: list[Change] | None
    time: float = msgspec.field(default_factory=lambda: time.time())


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> list[Change]:
    """The factors that differ, in the order of `new`, then of `old`."""
    names = dict.fromkeys((*new, *old))
    return [Change(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def closest(factors: Mapping[str, str], manifests: Iterable[Manifest]) -> tuple[Manifest, list[Change]] | None:
    """The entry with the fewest changes up to `factors`, and these; None when there are no entries.

    Changes in one group (the part of the name before the first dot) weigh as one first: another torch brings dozens of
    settings along.  Among equals it is the one whose changed values begin most alike (2.13.0 is closer to 2.13.1 than
    2.12.0 is), then the newest.
    """

    def distance(found: tuple[Manifest, list[Change]]) -> tuple[int, int, int, float]:
        manifest, changes = found
        groups = {change.name.partition(".")[0] for change in changes}
        alike = sum(common(change.old or "", change.new or "") for change in changes)
        return len(groups), len(changes), -alike, -manifest.created

    return min(((m, difference(m.factors, factors)) for m in manifests), key=distance, default=None)


def summary(changes: Sequence[Change] | None) -> str:
    """The line that says why there was a miss: "cache miss: torch 2.13.0 -> 2.13.1".

    `changes` are those of `closest`; None says that nothing is stored, none that an entry is there but was of no use.
    """
    if changes is None:
        return "cache miss: nothing is stored yet"
    if not changes:
        return "cache miss: an entry with these factors is there, but it is incomplete or cannot be used"
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return "cache miss: " + ", ".join(map(str, changes[:_SHOWN])) + more


def common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 - of any texts


def shorten(old: str, new: str, width: int = _WIDTH) -> tuple[str, str]:
    """Both values, of ones longer than `width` the part where they begin to differ."""
    start = max(0, common(old, new) - 10) if max(len(old), len(new)) > width else 0

    def cut(value: str) -> str:
        shown = value[start : start + width]
        return ("…" if start else "") + shown + ("…" if len(value) > start + width else "")

    return cut(old), cut(new)


def record(tree: Tree, miss: Miss) -> None:
    """Keep a miss, and of all the last `KEPT`.  Raises `OSError` as it comes; a miss that is not kept does no harm."""
    kept = _names(tree)
    number = int(kept[0].partition("-")[0]) + 1 if kept else 0
    tree.write("misses", f"{number:012d}-{os.getpid()}.json", data=seal(miss, FORMAT))
    for name in kept[KEPT - 1 :]:
        tree.remove("misses", name)


def read(tree: Tree) -> list[Miss]:
    """The misses that are kept, newest first; damaged ones and those of other formats are left out."""
    found = []
    for name in _names(tree):
        with suppress(DamagedError, ManifestError):
            found.append(unseal(tree.read("misses", name), Miss, FORMAT))
    return found


def _names(tree: Tree) -> list[str]:
    return [name for name in reversed(tree.names("misses")) if _NAME.fullmatch(name)]
