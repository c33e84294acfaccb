"""Seconds by phase: they add up to the wall time, and each instant belongs to what was waited for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import starts
from vllm_compile_ext.record import phases, read
from vllm_compile_ext.record.phases import Death
from vllm_compile_ext.record.read import Start

FRONT, CORE, W0, W1 = starts.FRONT, starts.CORE, *starts.WORKERS


def parsed(recorder: starts.Recorder) -> Start:
    return read.parse(recorder.bytes().splitlines(), "x")


def recorder() -> starts.Recorder:
    made = starts.Recorder()
    made.process(0, FRONT, 1, "front end")
    made.process(0, CORE, FRONT, "engine core")
    made.process(0, W0, CORE, "worker", 0)
    made.process(0, W1, CORE, "worker", 1)
    return made


def seconds(made: starts.Recorder) -> dict[str, float]:
    return {row.phase: round(row.seconds, 6) for row in phases.breakdown(parsed(made)).rows}


def test_cold() -> None:
    whole = phases.breakdown(parsed(starts.cold()))
    rows = {row.phase: row.seconds for row in whole.rows}
    assert sum(rows.values()) == pytest.approx(whole.seconds)
    assert list(rows) == [phase for phase in phases.PHASES if phase in rows]
    assert rows["compile"] == pytest.approx(9.5)  # rank 0's; rank 1 only waits
    assert rows["graph capture"] == pytest.approx(14.8)
    assert whole.coverage > 0.99
    assert whole.segments[0].begin == whole.begin
    assert whole.segments[-1].end == whole.end
    assert all(one.end == two.begin for one, two in zip(whole.segments, whole.segments[1:], strict=False))


def test_the_deepest_span_counts() -> None:
    made = recorder()
    outer = made.begin_span(None, FRONT, "start", 0)
    inner = made.begin_span(outer, FRONT, "imports", 1, "imports")
    made.span(inner, FRONT, "vllm", 2, 3)  # takes the phase of what is around it
    made.end_span(inner, 4)
    made.span(outer, FRONT, "config", 4, 6, "config")
    made.end_span(outer, 10)
    made.line("ready", 10)
    assert seconds(made) == {"imports": 3, "config": 2, "other": 5}


def test_work_goes_before_waiting() -> None:
    made = recorder()
    made.span(None, FRONT, "wait for the engine core", 0, 10, "spawn")
    made.span(None, CORE, "imports", 1, 4, "imports")
    made.span(None, W0, "wait for rank 1", 4, 8, "compile", wait=True)
    made.span(None, W1, "compile", 5, 7, "compile")
    made.line("ready", 10)
    whole = phases.breakdown(parsed(made))
    assert {row.phase: row.seconds for row in whole.rows} == {"imports": 3, "spawn": 3, "compile": 4}
    assert [segment.span.pid if segment.span else None for segment in whole.segments] == [
        FRONT,
        CORE,
        W0,
        W1,
        W0,
        FRONT,
    ]


def test_workers_go_before_those_above_them() -> None:
    made = recorder()
    made.span(None, CORE, "profiling", 0, 10, "memory profiling")
    made.span(None, W0, "compile", 2, 4, "compile")
    made.span(None, W0, "something", 5, 7)  # of no phase: what the engine core says is better
    made.line("ready", 10)
    assert seconds(made) == {"compile": 2, "memory profiling": 8}


def test_the_slowest_worker_is_waited_for() -> None:
    made = recorder()
    made.span(None, W0, "Load model", 0, 5, "weights")
    made.span(None, W1, "init", 0, 2, "distributed")
    made.span(None, W1, "Load model", 2, 6, "weights")
    made.line("ready", 6)
    assert seconds(made) == {"weights": 6}


def test_threads_of_a_process() -> None:
    made = recorder()
    made.span(None, FRONT, "one", 0, 6, "imports")
    made.span(None, FRONT, "two", 2, 8, "config")
    made.line("ready", 8)
    assert seconds(made) == {"imports": 2, "config": 6}


def test_gaps_and_what_comes_after_ready() -> None:
    made = recorder()
    made.span(None, FRONT, "imports", 0, 1, "imports")
    made.span(None, FRONT, "api server", 3, 5, "api server")
    made.line("ready", 4)
    made.span(None, FRONT, "first request", 9, 10, "first request")
    assert seconds(made) == {"imports": 1, "api server": 1, "other": 2}
    assert phases.breakdown(parsed(made)).coverage == pytest.approx(0.5)


def test_a_span_that_never_ended() -> None:
    made = recorder()
    made.begin_span(None, FRONT, "start", 0, "config")
    made.begin_span(None, W0, "Load model", 1, "weights")
    made.line("exit", 3, pid=W0, error=None)
    made.line("exit", 5, pid=FRONT, error=None)
    assert seconds(made) == {"config": 3, "weights": 2}


def test_circles_and_unknown_parents() -> None:
    made = recorder()
    made.line("span", 0, id="a", parent="b", pid=FRONT, name="a", end=made.at(2), attrs={"phase": "imports"})
    made.line("span", 1, id="b", parent="a", pid=FRONT, name="b", end=made.at(3), attrs={})
    made.line("span", 3, id="c", parent="gone", pid=FRONT, name="c", end=made.at(4), attrs={"phase": "new phase"})
    made.line("span", 4, id="d", parent="d", pid=FRONT, name="d", end=made.at(5), attrs={"phase": "config"})
    made.line("ready", 5)
    assert sum(seconds(made).values()) == 5
    assert list(seconds(made))[-2:] == ["config", "new phase"] or "other" in seconds(made)


def test_nothing_recorded() -> None:
    whole = phases.breakdown(Start(id="x"))
    assert (whole.rows, whole.segments, whole.seconds) == ([], [], 0)
    assert phases.death(Start(id="x")) == Death(None, None, "other", None)


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
    start = parsed(made)
    whole = phases.breakdown(start)
    assert sum(segment.end - segment.begin for segment in whole.segments) == whole.end - whole.begin
    assert sum(row.seconds for row in whole.rows) == pytest.approx(whole.seconds)
    assert 0 <= whole.coverage <= 1 + 1e-9
    assert phases.death(start) is None or start.ready is None


def test_by_process() -> None:
    alone = phases.by_process(parsed(starts.cold()))
    assert list(alone) == [FRONT, CORE, W0, W1]
    assert {row.phase: round(row.seconds, 3) for row in alone[W1]}["compile"] == 9.5
    assert {row.phase for row in alone[FRONT]} >= {"imports", "spawn", "api server"}


def test_compare() -> None:
    cold, warm = phases.breakdown(parsed(starts.cold())), phases.breakdown(parsed(starts.warm()))
    rows = {row.phase: row for row in phases.compare(cold, warm)}
    assert rows["compile"].new is None
    assert rows["compile"].seconds == pytest.approx(-9.5)
    assert rows["load compiled code"].old is None
    assert sum(row.seconds for row in rows.values()) == pytest.approx(warm.seconds - cold.seconds)


def test_death_by_an_error() -> None:
    gone = phases.death(parsed(starts.crashed()))
    assert gone is not None
    assert gone.process is not None
    assert gone.span is not None
    assert (gone.process.title, gone.span.name, gone.phase) == ("worker 1", "shard 1/6", "weights")
    assert gone.error is not None
    assert "out of memory" in gone.error


def test_death_without_a_word() -> None:
    gone = phases.death(parsed(starts.killed()))
    assert gone is not None
    assert gone.span is not None
    assert (gone.span.name, gone.phase, gone.error) == ("piece 2/3", "compile", None)


def test_an_error_that_was_held_up_is_no_death() -> None:
    made = recorder()
    outer = made.begin_span(None, CORE, "Load model", 0, "weights")
    inner = made.begin_span(outer, CORE, "from the cache", 1, "weights")
    made.end_span(inner, 2, "KeyError: 'x'")
    made.end_span(outer, 3)
    made.begin_span(None, CORE, "kv cache", 4, "kv cache")
    gone = phases.death(parsed(made))
    assert gone is not None
    assert gone.phase == "kv cache"


def test_ready_is_no_death() -> None:
    assert phases.death(parsed(starts.cold())) is None


def test_a_helper_is_waited_for() -> None:
    made = recorder()
    made.process(0, 99, FRONT, "helper")
    made.span(None, FRONT, "engine configuration", 0, 10, "config")
    made.span(None, 99, "imports", 2, 8, "imports")
    made.line("ready", 10)
    assert seconds(made) == {"imports": 6, "config": 4}
