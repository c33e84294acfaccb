"""What a miss is due to.

Factors are a flat table, name -> value, of everything that can change compiled code.  Where they come from is not known
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vllm_compile_ext.harmless import HIDDEN
from vllm_compile_ext.printable import plain
from vllm_compile_ext.store.store import Manifest

_WIDTH = 40  # characters of a value that fit into the line
_SHOWN = 3  # changes that fit into the line


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
        shown = (HIDDEN if str(value).startswith(HIDDEN) else value or "" for value in (self.old, self.new))
        old, new = _shorten(*shown)
        return plain(f"{self.name} {'unset' if self.old is None else old} -> {'unset' if self.new is None else new}")


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
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shorten(old: str, new: str) -> tuple[str, str]:
    """Both values, of long ones the part where they begin to differ."""
    start = common(old, new)
    start = max(0, start - 10) if max(len(old), len(new)) > _WIDTH else 0

    def cut(value: str) -> str:
        shown = value[start : start + _WIDTH]
        return ("…" if start else "") + shown + ("…" if len(value) > start + _WIDTH else "")

    return cut(old), cut(new)
