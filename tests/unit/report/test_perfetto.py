"""The Chrome trace, read as strictly as a viewer may: Perfetto drops what does not fit, without a word."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from tests import starts
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import Start
from vllm_compile_ext.report import facts, perfetto

FIELDS = {
    "M": {"ph", "name", "pid", "tid", "args"},
    "X": {"ph", "name", "cat", "ts", "dur", "pid", "tid", "args"},
    "i": {"ph", "name", "cat", "ts", "pid", "tid", "s"},
    "s": {"ph", "name", "cat", "id", "ts", "pid", "tid"},
    "f": {"ph", "name", "cat", "id", "ts", "pid", "tid", "bp"},
}


def overlapping() -> starts.Recorder:
    made = starts.Recorder()
    made.start(0)
    for number in range(3):
        made.span(None, 7, f"thread {number}", number, number + 2.5, "weights")
    return made


def events(start: Start) -> list[dict[str, Any]]:
    """The events of a trace, after all was checked that the Trace Event Format asks for."""
    made = perfetto.trace(facts.facts(start))
    loaded = json.loads(json.dumps(made, allow_nan=False))
    assert set(loaded) == {"traceEvents", "displayTimeUnit", "otherData"}
    threads = {(event["pid"], event["tid"]) for event in loaded["traceEvents"] if event["name"] == "thread_name"}
    open_: dict[tuple[int, int], list[int]] = defaultdict(list)  # the ends of a thread's spans, the innermost last
    arrows: dict[int, str] = defaultdict(str)
    last = 0
    for event in loaded["traceEvents"]:
        assert set(event) | {"args"} == FIELDS[event["ph"]] | {"args"}, event
        assert isinstance(event["name"], str)
        assert all(isinstance(event[name], int) for name in ("pid", "tid", "ts", "dur") if name in event)
        if event["ph"] == "M":
            continue
        assert event["ts"] >= last, "events are sorted"
        last = event["ts"]
        if event["ph"] == "X":
            track = event["pid"], event["tid"]
            assert track in threads
            while open_[track] and open_[track][-1] <= event["ts"]:
                open_[track].pop()
            end = event["ts"] + event["dur"]
            assert event["ts"] <= end <= min(open_[track], default=end), "spans of a thread nest"
            open_[track].append(end)
        elif event["ph"] in "sf":
            arrows[event["id"]] += event["ph"]
    assert set(arrows.values()) <= {"sf"}, "arrows have two ends, in order"
    found: list[dict[str, Any]] = loaded["traceEvents"]
    return found


@pytest.mark.parametrize("made", [starts.cold, starts.warm, starts.crashed, starts.killed, overlapping, starts.damaged])
def test_every_span_is_in_a_valid_trace(made: Any) -> None:
    content = made()
    start = read.parse(content.splitlines(), "x") if isinstance(content, bytes) else content.read()
    assert len([event for event in events(start) if event["ph"] == "X"]) == len(start.spans)


def test_threads_get_tracks_and_lines_of_their_own() -> None:
    start = overlapping().read()
    assert {event["tid"] for event in events(start) if event["ph"] == "X"} == {1, 2, 3}
    (process,) = facts.facts(start)["processes"]
    assert [span["line"] for span in process["spans"]] == [0, 1, 2]


def test_processes_marks_notes_and_arrows() -> None:
    found = events(starts.cold().read())
    processes = [event["args"]["name"] for event in found if event["name"] == "process_name"]
    assert processes == ["front end (4100)", "engine core (4200)", "worker 0 (4301)", "worker 1 (4302)"]
    names = {event["name"] for event in found if event["ph"] == "i"}
    assert {"ready", "first token", "loaded 81 pieces of b818f53c0d22 in 20 ms"} <= names
    assert {event["pid"] for event in found if event["ph"] == "s"} == {starts.FRONT, starts.CORE}
