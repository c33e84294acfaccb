"""Where stock's capture stays, and the page that has it; tests/contract has a test for each line of the table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from vllm_compile_ext import settings
from vllm_compile_ext.cuda_graphs import coverage, memory, replacements, session
from vllm_compile_ext.cuda_graphs.coverage import Row
from vllm_compile_ext.cuda_graphs.memory import FULL, PIECEWISE


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_COMPILE_CUDAGRAPHS", raising=False)
    monkeypatch.setattr(coverage, "_given_up", set())
    monkeypatch.setattr(
        coverage,
        "STOCK",
        (Row("one", "a", "-", lambda config: config.one), Row("two", "b", "-", lambda config: config.two)),
    )


def config(one: bool = False, two: bool = False, mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> Any:
    compilation = SimpleNamespace(cudagraph_mode=mode)
    return SimpleNamespace(one=one, two=two, compilation_config=compilation, additional_config={})


def test_the_first_line_that_holds_is_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for made in (config(), config(two=True), config(one=True, two=True), config(one=True, mode=CUDAGraphMode.NONE)):
        coverage.say(made)
    assert [coverage.on_demand(made) for made in (config(), config(two=True))] == [True, False]
    said = "CUDA graphs are captured at start, as in stock vLLM, with"
    assert [record.getMessage() for record in caplog.records] == [f"{said} two: b", f"{said} one: a"]


def test_it_says_why_no_graph_is_captured_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (config(), config(two=True), config(two=True, mode=CUDAGraphMode.NONE))
    assert [coverage.why_at_start(each) for each in made] == [None, "two: b", "cudagraph_mode NONE"]
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", "eager")
    assert coverage.why_at_start(config()) == "VLLM_COMPILE_CUDAGRAPHS=eager"


def test_a_configuration_that_was_given_up_is_stocks_without_another_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    made = SimpleNamespace()  # a surprise again, if it were asked
    coverage.give_up(made)
    coverage.say(made)
    assert coverage.on_demand(made) is False
    assert caplog.records == []
    assert coverage.on_demand(config()) is True


@pytest.mark.parametrize(("value", "expected"), [("lazy", True), ("idle", True), ("eager", False)])
def test_what_was_asked_for_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str, expected: bool
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", value)
    assert coverage.on_demand(config()) is expected
    coverage.say(config(one=True))
    assert len(caplog.records) == expected


def test_each_configuration_has_what_was_asked_for_it() -> None:
    lazy, eager = config(), config()
    eager.additional_config = {"compile_ext": {"cudagraphs": "eager"}}
    assert [coverage.on_demand(made) for made in (lazy, eager, lazy)] == [True, False, True]


def test_the_docs_page_has_the_table_the_values_and_the_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    page = (Path(__file__).parents[3] / "docs" / "cudagraphs.md").read_text()
    assert page.endswith(coverage.markdown()), "put coverage.markdown() at the end of docs/cudagraphs.md"
    (row,) = [row for row in settings.table() if row.name == "VLLM_COMPILE_CUDAGRAPHS"]
    assert row.allowed == "lazy, idle or eager"
    full, piecewise, padded = session.BATCHES[FULL], session.BATCHES[PIECEWISE], session.BATCHES_PADDED
    far, larger = (
        session.BATCHES_FAR,
        f"of more than {session.PAD_FREELY} tokens, and of more than {session.PAD_FACTOR}",
    )
    between, apart = session.BATCHES_BETWEEN, "batches between this capture and the one before"
    for line in (
        *("| `lazy` (default) |", "| `idle` |", "| `eager` |"),
        f"| captured for which batch without a graph | the {full}st | the {piecewise}th |",
        f"| for which batch of its size, where a larger graph serves meanwhile | the {padded}th | the {padded}th |",
        f"| where that is {larger} times its size | the {far}th | the {far}th |",
        f"a graph of up to {session.PAD_FREELY} tokens, or {session.PAD_FACTOR} times as many, counts as faster",
        f"| {apart} | 0, or {between} where a larger graph serves | {between} |",
        f"no request for {replacements.PATIENCE} s",
        f"less than {memory.MARGIN // memory.MIB} MiB free",
        f"{memory.UNKEPT_MARGIN >> 30} GiB stays free",
        f"{session.BATCHES_POSTPONED} batches later",
        f"The {memory.KEPT} newest are kept",
    ):
        assert line in page
    assert (memory.UNASKED, session.FAILURES) == (0.25, 3), "the page says: a quarter, the third"
