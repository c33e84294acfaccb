"""Kept code is loaded where nothing that it depends on has changed, and nowhere else: see `loads.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import process
from tests.fuzz import loads, sizes
from tests.fuzz.loads import Starts

CHANGES = list(loads.CHANGES)[:: sizes.EVERY_CHANGE]
pytestmark = pytest.mark.engine  # they start none, but compile


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    return loads.starts(tmp_path_factory.mktemp("loads"), CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_starts(three: Starts, name: str) -> None:
    found = loads.wrong(three, name)
    assert not found, "; ".join(found)


def test_nothing_is_kept_without_assertions(tmp_path: Path) -> None:
    """Under `python -O` an upstream pass leaves out a store: the code that it makes is wrong."""
    outcome = process.run(loads.START, "0", "number", folder=tmp_path, PYTHONOPTIMIZE="1")
    assert outcome.code == 0, outcome.output[-5000:]
    assert "error" not in outcome.value["number"], outcome.value
    assert outcome.value["number"]["kept"] == 0
    assert not loads.wrong(loads.starts(tmp_path, ["number"]), "number"), "the next starts keep and load"
