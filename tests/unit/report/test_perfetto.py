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


def trace(start: Start) -> dict[str, Any]:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = json.dumps(perfetto.trace(start, facts.facts(start)))
    loaded: dict[str, Any] = json.loads(text, parse_constant=no_constants)
    return loaded


def check(loaded: dict[str, Any]) -> None:
    """All that the Trace Event Format asks for."""
    assert set(loaded) == {"traceEvents", "displayTimeUnit", "otherData"}
    events = loaded["traceEvents"]
    names: set[tuple[int, int]] = set()
    stacks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    flows: dict[int, list[str]] = defaultdict(list)
    last = 0
    for event in events:
        assert set(event) - {"args"} == FIELDS[event["ph"]] - {"args"}, event
        assert isinstance(event["name"], str)
        assert all(isinstance(event[name], int) for name in ("pid", "tid", "ts", "dur") if name in event)
        track = event["pid"], event["tid"]
        if event["ph"] == "M":
            names.add(track)
            continue
        assert event["ts"] >= last, "events are sorted"
        last = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert track in names, "a named thread"
            stack = stacks[track]
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                stack.pop()
            if stack:
                outer = stack[-1]
                assert event["ts"] + event["dur"] <= outer["ts"] + outer["dur"], "spans of a thread nest"
            stack.append(event)
        elif event["ph"] in "sf":
            flows[event["id"]].append(event["ph"])
        else:
            assert event["s"] in ("g", "p", "t")
    assert all(found == ["s", "f"] for found in flows.values()), "arrows have two ends, in order"


@pytest.mark.parametrize("made", [starts.cold, starts.warm, starts.crashed, starts.killed])
def test_starts(made: Any) -> None:
    start = read.parse(made().bytes().splitlines(), "x")
    loaded = trace(start)
    check(loaded)
    spans = [event for event in loaded["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(start.spans)
    processes = [event["args"]["name"] for event in loaded["traceEvents"] if event["name"] == "process_name"]
    assert processes == ["front end (4100)", "engine core (4200)", "worker 0 (4301)", "worker 1 (4302)"]


def test_damaged() -> None:
    check(trace(read.parse(starts.damaged().splitlines(), "x")))


def test_threads_get_tracks_of_their_own() -> None:
    made = starts.Recorder()
    made.start(0)
    for number in range(3):
        made.span(None, 7, f"thread {number}", number, number + 2.5, "weights")
    loaded = trace(read.parse(made.bytes().splitlines(), "x"))
    check(loaded)
    assert {event["tid"] for event in loaded["traceEvents"] if event["ph"] == "X"} == {1, 2, 3}


def test_numbers_that_json_does_not_have() -> None:
    made = starts.Recorder()
    made.span(None, 7, "x", 0, 1, "weights", speed=float("nan"), most=float("inf"))
    check(trace(read.parse(made.bytes().splitlines(), "x")))


def test_marks_and_notes() -> None:
    loaded = trace(read.parse(starts.cold().bytes().splitlines(), "x"))
    names = [event["name"] for event in loaded["traceEvents"] if event["ph"] == "i"]
    assert {"ready", "first token", "cache miss: torch 2.13.0 -> 2.13.1"} <= set(names)
    arrows = [event for event in loaded["traceEvents"] if event["ph"] == "s"]
    assert {event["pid"] for event in arrows} == {starts.FRONT, starts.CORE}
