"""Three starts of the models of `loads.py`, each in a process of its own, and what must hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import process
from tests.fuzz import loads

Starts = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def starts(folder: Path, names: Sequence[str] = ()) -> Starts:
    """What a first start in the first state gives, another one in that state, and one in the other state."""
    return tuple(_start(folder, state, names) for state in (0, 0, 1))  # type: ignore[return-value]


def _start(folder: Path, state: int, names: Sequence[str]) -> dict[str, Any]:
    outcome = process.run(loads.START, str(state), *names, folder=folder, fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    value: dict[str, Any] = outcome.value
    return value


def wrong(three: Starts, name: str) -> list[str]:
    """What does not hold of a change, in words."""
    first, again, other = (start[name] for start in three)
    change, found = loads.CHANGES[name], []
    for start, which in ((first, "first start"), (again, "same state"), (other, "other state")):
        if "error" in start:
            return [f"{which}: {start['error']}"]
        off = max(start["off"], start["again"])
        if not off <= 1e-4:
            found.append(f"{which}: off by {off:.2g} ({'loaded' if start['loaded'] else 'compiled'})")
    if not first["kept"]:
        found.append("first start: nothing kept")
    elif not again["loaded"]:
        found.append("same state: not loaded")
    if change.loads and first["kept"] and not other["loaded"]:
        found.append("other state: not loaded")
    if not change.loads and first["expected"] == other["expected"]:
        found.append("the change changes nothing")
    return found
