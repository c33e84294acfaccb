"""Recorded starts are read as they are, whatever a crash or a damaged disk left of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import starts
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import ReadError


def test_cold() -> None:
    start = starts.cold().read()
    assert (start.model, start.temperature, start.skipped, start.failed) == (starts.MODEL, "cold", 0, False)
    assert start.trace == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert start.versions["vllm"] == "0.32.0"
    assert [process.title for process in start.processes] == ["front end", "engine core", "worker 0", "worker 1"]
    assert start.begin == starts.BEGIN  # before the first line: the interpreter was at work
    assert start.ready is not None
    assert start.first_token is not None
    assert start.seconds == pytest.approx((start.ready - starts.BEGIN) / 1e9)
    assert all(span.end is not None for span in start.spans)
    assert starts.warm().read().temperature == "warm"
    assert {note.name for note in start.notes} == {"key", "miss", "compiled", "kept", "loaded", "graphs"}


def test_unfinished() -> None:
    start = starts.killed().read()
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


def test_a_process_that_says_nothing_of_itself() -> None:
    recorder = starts.Recorder()
    recorder.span(None, 7, "imports", 0, 1, "imports")
    assert [(process.pid, process.title) for process in recorder.read().processes] == [(7, "process")]


USELESS: list[object] = [
    {"k": "span", "t": 1},
    {"k": "span", "t": 1, "id": "a"},
    {"k": "span", "t": 1, "pid": 1},
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
    # of wrong types
    {"k": "start", "t": 5, "model": 7},
    {"k": "span", "t": 5, "id": "a", "pid": 1, "name": "x", "attrs": 4},
    {"k": "end", "t": 5, "id": "a", "error": 9},
    {"k": "note", "t": 5, "name": "x", "attrs": []},
]
# That parsers choke on.
NOISE = [b"[" * 100_000, b'{"k": "ready", "t": 1e999}', b'{"k": "ready", "t": NaN}', b"\xff\xfe"]


@pytest.mark.parametrize("raw", [*(json.dumps(line).encode() for line in USELESS), *NOISE], ids=lambda raw: raw[:60])
def test_useless_lines(raw: bytes) -> None:
    start = read.parse([raw], "x")
    assert start.skipped == 1
    assert (start.ready, start.spans, start.processes, start.notes) == (None, [], [], [])


def test_a_clock_that_was_set_back() -> None:
    lines = [{"k": "span", "t": 5, "id": "a", "pid": 1, "name": "x", "later": 1}, {"k": "end", "t": 4, "id": "a"}]
    (span,) = read.parse([json.dumps(line).encode() for line in lines], "x").spans
    assert span.end == span.start


def test_files(tmp_path: Path) -> None:
    folder = starts.folder(tmp_path / "starts")
    crashed, warm, cold = read.starts(folder)
    assert [crashed.id, warm.id, cold.id] == [
        "20261118-130640-c0ffee",
        "20261118-120640-77a0c3",
        "20261118-110640-4bf92f",
    ]
    latest = read.read(starts.warm().write(folder, "20261118-160000-000002"))
    other = read.read(starts.cold(starts.BEGIN, "other/model").write(folder, "20261118-150000-000001"))
    assert read.previous(latest, folder) == warm  # the crashed one did not get ready, the other is of another model
    assert read.previous(warm, folder) == cold
    assert read.previous(cold, folder) is None
    assert read.previous(other, folder) is None


def test_not_a_start(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("")
    with pytest.raises(ReadError, match="is not a recorded start"):
        read.read(path)
    with pytest.raises(FileNotFoundError):
        read.read(tmp_path / "none.jsonl")
    assert read.recorded(tmp_path / "none") == []
