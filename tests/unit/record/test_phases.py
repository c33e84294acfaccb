"""Seconds by phase: they add up to the wall time, and each instant belongs to what was waited for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import starts
from vllm_compile_ext.record import phases
from vllm_compile_ext.record.phases import Death
from vllm_compile_ext.record.read import Start

FRONT, CORE, W0, W1 = starts.FRONT, starts.CORE, *starts.WORKERS
HELPER = 99


def recorder() -> starts.Recorder:
    made = starts.Recorder()
    made.process(0, FRONT, 1, "front end")
    made.process(0, CORE, FRONT, "engine core")
    made.process(0, W0, CORE, "worker", 0)
    made.process(0, W1, CORE, "worker", 1)
    made.process(0, HELPER, FRONT, "helper")
    return made


def seconds(start: Start) -> dict[str, float]:
    return {row.phase: round(row.seconds, 6) for row in phases.breakdown(start).rows}


def test_cold() -> None:
    whole = phases.breakdown(starts.cold().read())
    rows = {row.phase: row.seconds for row in whole.rows}
    assert sum(rows.values()) == pytest.approx(whole.seconds)
    assert list(rows) == [phase for phase in phases.PHASES if phase in rows]
    assert rows["compile"] == pytest.approx(9.5)  # rank 0's; rank 1 only waits
    assert rows["graph capture"] == pytest.approx(14.8)
    assert whole.coverage > 0.99
    assert whole.segments[0].begin == whole.begin
    assert whole.segments[-1].end == whole.end
    assert all(one.end == two.begin for one, two in zip(whole.segments, whole.segments[1:], strict=False))


# What is recorded, each with process, begin, end, phase and attributes of a span; the rows; and when it was ready.
CASES: dict[str, tuple[list[tuple[Any, ...]], dict[str, float], float]] = {
    "work goes before waiting": (
        [
            (FRONT, 0, 10, "spawn"),
            (CORE, 1, 4, "imports"),
            (W0, 4, 8, "compile", {"wait": True}),
            (W1, 5, 7, "weights"),
        ],
        {"imports": 3, "spawn": 3, "weights": 2, "compile": 2},
        10,
    ),
    "workers go before those above them, unless nothing is known of what they do": (
        [(CORE, 0, 10, "memory profiling"), (W0, 2, 4, "compile"), (W0, 5, 7, None)],
        {"compile": 2, "memory profiling": 8},
        10,
    ),
    "the slowest worker is waited for": (
        [(W0, 0, 5, "weights"), (W1, 0, 2, "distributed"), (W1, 2, 6, "weights")],
        {"weights": 6},
        6,
    ),
    "a helper is waited for": ([(FRONT, 0, 10, "config"), (HELPER, 2, 8, "imports")], {"imports": 6, "config": 4}, 10),
    "of threads the one that began last": (
        [(FRONT, 0, 6, "imports"), (FRONT, 2, 8, "config")],
        {"imports": 2, "config": 6},
        8,
    ),
    "gaps, and what comes after ready": (
        [(FRONT, 0, 1, "imports"), (FRONT, 3, 5, "api server"), (FRONT, 9, 10, "first request")],
        {"imports": 1, "api server": 1, "other": 2},
        4,
    ),
}


@pytest.mark.parametrize(("spans", "rows", "ready"), CASES.values(), ids=CASES)
def test_each_instant_belongs_to_what_was_waited_for(
    spans: list[tuple[Any, ...]], rows: dict[str, float], ready: float
) -> None:
    made = recorder()
    for pid, begin, end, phase, *attrs in spans:
        made.span(None, pid, "span", begin, end, phase, **(attrs[0] if attrs else {}))
    made.line("ready", ready)
    assert seconds(made.read()) == rows
    assert phases.breakdown(made.read()).coverage == pytest.approx(1 - rows.get("other", 0) / ready)


def test_the_deepest_span_counts() -> None:
    made = recorder()
    outer = made.begin_span(None, FRONT, "start", 0)
    inner = made.begin_span(outer, FRONT, "imports", 1, "imports")
    made.span(inner, FRONT, "vllm", 2, 3)  # takes the phase of what is around it
    made.end_span(inner, 4)
    made.span(outer, FRONT, "config", 4, 6, "config")
    made.end_span(outer, 10)
    made.line("ready", 10)
    assert seconds(made.read()) == {"imports": 3, "config": 2, "other": 5}


def test_a_span_that_never_ended() -> None:
    made = recorder()
    made.begin_span(None, FRONT, "start", 0, "config")
    made.begin_span(None, W0, "Load model", 1, "weights")
    made.line("exit", 3, pid=W0, error=None)
    made.line("exit", 5, pid=FRONT, error=None)
    assert seconds(made.read()) == {"config": 3, "weights": 2}


def test_circles_and_unknown_parents() -> None:
    made = recorder()
    for number, (key, parent, phase) in enumerate([("a", "b", "imports"), ("b", "a", ""), ("c", "gone", "new phase")]):
        attrs = {"phase": phase} if phase else {}
        made.line("span", number, id=key, parent=parent, pid=FRONT, name=key, end=made.at(number + 1), attrs=attrs)
    made.line("span", 3, id="d", parent="d", pid=FRONT, name="d", end=made.at(4), attrs={})
    assert seconds(made.read()) == {"imports": 2, "new phase": 1, "other": 1}


def test_nothing_recorded() -> None:
    whole = phases.breakdown(Start(id="x", time=0))
    assert (whole.rows, whole.segments, whole.seconds) == ([], [], 0)
    assert phases.death(Start(id="x", time=0)) == Death(None, None, "other", None)


SPANS = st.lists(
    st.tuples(
        st.sampled_from([FRONT, CORE, W0, W1]),
        st.integers(0, 50),
        st.integers(0, 20),
        st.sampled_from([None, *phases.PHASES]),
        st.integers(-1, 30),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(spans=SPANS, ready=st.none() | st.integers(0, 60))
def test_rows_add_up(spans: list[tuple[int, int, int, str | None, int, bool]], ready: int | None) -> None:
    made = recorder()
    made.start(0.5)
    keys: list[str] = []
    for pid, begin, length, phase, parent, ends in spans:
        key = made.begin_span(keys[parent] if 0 <= parent < len(keys) else None, pid, "span", begin, phase)
        if ends:
            made.end_span(key, begin + length)
        keys.append(key)
    if ready is not None:
        made.line("ready", ready)
    start = made.read()
    whole = phases.breakdown(start)
    assert sum(segment.end - segment.begin for segment in whole.segments) == whole.end - whole.begin
    assert sum(row.seconds for row in whole.rows) == pytest.approx(whole.seconds)
    assert 0 <= whole.coverage <= 1 + 1e-9
    assert phases.death(start) is None or start.ready is None


def test_by_process() -> None:
    alone = phases.by_process(starts.cold().read())
    assert list(alone) == [FRONT, CORE, W0, W1]
    assert {row.phase: round(row.seconds, 3) for row in alone[W1]}["compile"] == 9.5
    assert {row.phase for row in alone[FRONT]} >= {"imports", "spawn", "api server"}


def test_compare() -> None:
    cold, warm = phases.breakdown(starts.cold().read()), phases.breakdown(starts.warm().read())
    rows = {phase: (old, new) for phase, old, new in phases.compare(cold, warm)}
    assert rows["compile"] == (pytest.approx(9.5), None)
    assert rows["load compiled code"][0] is None
    assert sum((new or 0) - (old or 0) for old, new in rows.values()) == pytest.approx(warm.seconds - cold.seconds)


def held_up() -> starts.Recorder:
    """An error was held up around where it happened, and the start went on."""
    made = recorder()
    outer = made.begin_span(None, CORE, "Load model", 0, "weights")
    made.end_span(made.begin_span(outer, CORE, "from the cache", 1, "weights"), 2, "KeyError: 'x'")
    made.end_span(outer, 3)
    made.begin_span(None, CORE, "layout", 4, "kv cache")
    return made


@pytest.mark.parametrize(
    ("made", "process", "span", "phase", "error"),
    [
        (starts.crashed, "worker 1", "shard 1/6", "weights", "OutOfMemoryError: CUDA out of memory."),
        (starts.killed, "worker 0", "piece 2/3", "compile", "None"),
        (held_up, "engine core", "layout", "kv cache", "None"),
    ],
)
def test_death(made: Any, process: str, span: str, phase: str, error: str) -> None:
    gone = phases.death(made().read())
    assert gone is not None
    assert gone.process is not None
    assert gone.span is not None
    assert (gone.process.title, gone.span.name, gone.phase) == (process, span, phase)
    assert str(gone.error).startswith(error)


def test_ready_is_no_death() -> None:
    assert phases.death(starts.cold().read()) is None
