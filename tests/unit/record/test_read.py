"""Recorded starts are read as they are, whatever a crash or a damaged disk left of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests import starts
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import ReadError, Start


def parsed(recorder: starts.Recorder, name: str = "x") -> Start:
    return read.parse(recorder.bytes().splitlines(), name)


def test_cold() -> None:
    start = parsed(starts.cold())
    assert (start.model, start.temperature, start.skipped, start.failed) == (starts.MODEL, "cold", 0, False)
    assert start.trace == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert start.versions["vllm"] == "0.32.0"
    assert [process.title for process in start.processes] == ["front end", "engine core", "worker 0", "worker 1"]
    assert start.begin == starts.BEGIN  # before the first line: the interpreter was at work
    assert start.ready is not None
    assert start.first_token is not None
    assert start.seconds == pytest.approx((start.ready - starts.BEGIN) / 1e9)
    assert all(span.end is not None for span in start.spans)
    assert {note.name for note in start.notes} == {"key", "miss", "compiled", "kept", "loaded", "graphs"}


def test_warm() -> None:
    assert parsed(starts.warm()).temperature == "warm"


def test_unfinished() -> None:
    start = parsed(starts.killed())
    assert start.ready is None
    assert not start.failed
    assert [span.name for span in start.spans if span.end is None][-1] == "piece 2/3"
    assert next(span.phase for span in start.spans if span.name == "piece 2/3") == "compile"


def test_damaged() -> None:
    start = read.parse(starts.damaged().splitlines(keepends=True), "x")
    # The cut line, three of other formats, the damaged time, the ends of what is lost, and the last line.
    assert start.skipped == 7
    assert start.model == starts.MODEL
    assert len(start.spans) > 30


def test_lines_in_any_order() -> None:
    lines = starts.cold().bytes().splitlines()
    start = read.parse(lines, "x")
    random.Random(0).shuffle(lines)
    again = read.parse(lines, "x")
    key = [(span.id, span.start, span.end, span.attrs) for span in sorted(start.spans, key=lambda span: span.id)]
    assert [(s.id, s.start, s.end, s.attrs) for s in sorted(again.spans, key=lambda span: span.id)] == key
    assert (again.ready, again.begin, again.processes) == (start.ready, start.begin, start.processes)


def test_a_process_says_its_rank_later() -> None:
    recorder = starts.Recorder()
    recorder.process(0, 7, 1, "worker")
    recorder.process(0, 7, 1, "worker", 3)
    recorder.process(0, 7, 1, "worker")
    assert [process.rank for process in parsed(recorder).processes] == [3]


def test_a_process_that_says_nothing_of_itself() -> None:
    recorder = starts.Recorder()
    recorder.span(None, 7, "imports", 0, 1, "imports")
    assert [(process.pid, process.title) for process in parsed(recorder).processes] == [(7, "process")]


@pytest.mark.parametrize(
    "line",
    [
        {"k": "span", "t": 1},
        {"k": "begin", "t": 1, "id": "a"},
        {"k": "begin", "t": 1, "pid": 1},
        {"k": "end", "t": 1},
        {"k": "end", "t": 1, "id": "never begun"},
        {"k": "ready"},
        {"k": "ready", "t": True},
        {"k": "ready", "t": -5},
        {"k": "ready", "t": 2**80},
        {"k": "process", "t": 1, "pid": "x"},
        {"k": "note", "t": 1},
        {"k": "_init__", "t": 1},
        {"k": ["span"], "t": 1},
        {"t": 1},
        [],
        None,
    ],
)
def test_useless_lines(line: object) -> None:
    start = read.parse([json.dumps(line).encode()], "x")
    assert start.skipped == 1
    assert (start.ready, start.spans, start.processes, start.notes) == (None, [], [], [])


@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b'{"k": "ready", "t": 1e999}', b'{"k": "ready", "t": NaN}', b"\xff\xfe"]
)
def test_lines_that_parsers_choke_on(raw: bytes) -> None:
    assert read.parse([raw], "x").skipped == 1


@pytest.mark.parametrize(
    "line",
    [
        {"k": "start", "t": 5, "model": 7},
        {"k": "begin", "t": 5, "id": "a", "pid": 1, "name": "x", "attrs": 4},
        {"k": "end", "t": 5, "id": "a", "error": 9},
        {"k": "note", "t": 5, "name": "x", "attrs": []},
    ],
)
def test_lines_with_wrong_types_are_skipped(line: object) -> None:
    assert read.parse([json.dumps(line).encode()], "x").skipped == 1


def test_a_clock_that_was_set_back() -> None:
    lines = [{"k": "begin", "t": 5, "id": "a", "pid": 1, "name": "x", "later": 1}, {"k": "end", "t": 4, "id": "a"}]
    (span,) = read.parse([json.dumps(line).encode() for line in lines], "x").spans
    assert span.end == span.start


def test_files(tmp_path: Path) -> None:
    folder = starts.folder(tmp_path / "starts")
    assert [start.id for start in read.starts(folder)] == [
        "20261118-130640-c0ffee",
        "20261118-120640-77a0c3",
        "20261118-110640-4bf92f",
    ]
    warm = read.read(folder / "20261118-120640-77a0c3.jsonl")
    before = read.previous(warm, folder)
    assert before is not None
    assert before.id == "20261118-110640-4bf92f"
    assert read.previous(before, folder) is None
    crashed = read.read(folder / "20261118-130640-c0ffee.jsonl")
    later = starts.cold(starts.BEGIN, "other/model")
    path = later.write(folder, "20261118-150000-000001")
    assert read.previous(read.read(path), folder) is None  # of another model
    later = starts.warm()
    latest = read.read(later.write(folder, "20261118-160000-000002"))
    assert read.previous(latest, folder) is not None
    assert read.previous(latest, folder).id == warm.id != crashed.id  # type: ignore[union-attr]  # it got ready


def test_not_a_start(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("")
    with pytest.raises(ReadError, match="is not a recorded start"):
        read.read(path)
    with pytest.raises(FileNotFoundError):
        read.read(tmp_path / "none.jsonl")
    assert read.recorded(tmp_path / "none") == []
