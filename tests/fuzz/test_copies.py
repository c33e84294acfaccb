"""Layers are copied only where tracing each of them gives the same: see `copies.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.fuzz import copies, known, sizes
from tests.fuzz.copies import Result


@pytest.fixture(scope="module", autouse=True)
def unlogged() -> Iterator[None]:
    """pytest would keep all that Dynamo says."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return list(copies.generated(sizes.SUITE_STACKS))


def bad(results: list[Result]) -> str:
    return "\n".join(str(r) for r in results if r.bad)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stacks_from_seeds_give_what_the_model_gives(results: list[Result]) -> None:
    found = bad(results)
    assert not found, f"{copies.summary(results)}\nshow one with python -m tests.fuzz.copies --case N\n{found}"


def test_few_cases_are_too_much_for_dynamo(results: list[Result]) -> None:
    unsupported = [r for r in results if r.outcome == "unsupported"]
    assert len(unsupported) <= len(results) / 10, "\n".join(map(str, unsupported))


def test_layers_that_differ_by_tensors_names_and_what_nobody_reads_are_copied(results: list[Result]) -> None:
    benign = [r for r in results if r.kind == "benign"]
    share = copies.copied(benign)
    assert share is not None
    assert share[0] >= 0.95 * share[1], "\n".join(str(r) for r in benign if r.copied < (r.expected or 0))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", known.CASES)
def test_known_cases(name: str) -> None:
    result = copies.judge(name, "known", known.CASES[name])
    assert result.outcome == "right", f"{result}\n{known.CASES[name].source}"
    assert result.expected in (None, result.copied), result
