"""What the front end says of its start, by the file that all its processes write."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import starts
from vllm_compile_ext.record import read, recorder, watcher
from vllm_compile_ext.record.events import span
from vllm_compile_ext.record.file import encode
from vllm_compile_ext.record.recorder import Recorder
from vllm_compile_ext.record.watcher import progress_line, table

S = 10**9


def start(name: str, *rows: tuple[str, float, float | None], note: str = "compiled", **attrs: Any) -> read.Start:
    """A start of `rows`, each a phase with the seconds at which it begins and ends, and a note in the last of them."""
    made = starts.Recorder(S)
    made.start(0, "m")
    for phase, begin, end in rows:
        span = made.begin_span(None, 1, phase, begin, phase)
        if end is not None:
            made.end_span(span, end)
    made.note(rows[-1][1], 1, note, **attrs)
    return made.read(name)


def ready(name: str, *rows: tuple[str, float, float], note: str = "compiled") -> read.Start:
    made = start(name, *rows, note=note)
    made.ready = int((1 + rows[-1][2]) * S)
    return made


def test_the_table() -> None:
    first = ready("a", ("imports", 0, 5), ("compile", 5, 20))
    assert table(first, None).splitlines() == [
        "ready 20.0 s after the process began (vllm-compile-ext report a)",
        "  phase                 seconds  share",
        "  imports                  5.00  25.0%",
        "  compile                 15.00  75.0%",
    ]
    second = ready("b", ("imports", 0, 4), ("load compiled code", 4, 4.5), note="loaded")
    assert table(second, first).splitlines() == [
        "ready 4.5 s after the process began; cold before (a): 20.0 s (vllm-compile-ext report b)",
        "  phase                 seconds  share   before   change",
        "  imports                  4.00  88.9%     5.00    -1.00",
        "  compile                  0.00   0.0%    15.00   -15.00",
        "  load compiled code       0.50  11.1%     0.00    +0.50",
    ]


PROGRESS = {"note": "progress", "done": 1, "total": 3, "what": "distinct pieces"}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (start("a", ("imports", 0, 5), ("weights", 5, None)), "loading weights for 15 s"),
        (start("a", ("imports", 0, 5), ("weights", 5, 8), ("weights", 8, None)), "loading weights for 15 s"),
        (start("a", ("kv cache", 0, None)), "kv cache for 20 s"),
        (start("a", ("imports", 0, 5)), "something that no span names for 15 s"),
        (start("a", ("compile", 5, None), **PROGRESS), "compiling for 15 s (1 of 3 distinct pieces)"),
    ],
)
def test_a_line_about_what_is_waited_for(made: read.Start, said: str) -> None:
    assert progress_line(made, 21 * S) == f"starting for 20 s: {said}"


def test_progress_of_an_earlier_phase_is_not_said() -> None:
    made = start("a", ("compile", 0, 10), **PROGRESS)
    made.spans += start("b", ("weights", 10, None)).spans
    assert progress_line(made, 21 * S) == "starting for 20 s: loading weights for 10 s"


@pytest.fixture
def to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Recorder]:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(recorder.VARIABLE, "")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(recorder, "current", None)
    monkeypatch.setattr(watcher, "EVERY", 0.02)
    made = recorder.begin()
    assert made is not None
    assert made.open({"model": "m"})
    yield made
    recorder.forget()


def watch(to: Recorder) -> threading.Thread:
    watcher.watch(to)
    assert to.watcher is not None
    return to.watcher


def until(caplog: pytest.LogCaptureFixture, text: str) -> None:
    for _ in range(500):
        if text in caplog.text:
            return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} was not said: {caplog.text}")


def test_a_start_is_watched_to_its_end(to: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    watching = watch(to)
    with span("weights", "weights"):
        until(caplog, "loading weights")
    to.ready()
    until(caplog, "ready ")
    caplog.clear()
    to.request()
    to.first_token()
    watching.join(10)
    assert not watching.is_alive()
    assert not [record for record in caplog.records if "starting for" in record.message]


def test_the_lines_can_be_switched_off(
    to: Recorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPILE_PROGRESS", "0")
    watch(to)
    time.sleep(0.1)
    to.ready()
    until(caplog, "ready ")
    assert "starting for" not in caplog.text


def test_another_process_gets_ready(to: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """Of several API servers, none is the process that began the start."""
    watching = watch(to)
    assert to.file is not None
    to.file.write(encode({"k": "ready", "t": recorder.now()}))
    until(caplog, "ready ")
    last = recorder.now()
    to.file.write(encode({"k": "first_token", "t": last}))
    watching.join(10)
    assert to.over
    (root,) = read.read(read.recorded()[-1]).spans
    assert root.end == last


def test_a_start_that_fails_is_exported_before_it_goes_on(to: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = threading.Event()

    def send(self: object, start: read.Start, *, over: bool) -> None:
        time.sleep(0.05)
        assert (over, start.failed) == (True, True)
        sent.set()

    monkeypatch.setattr(watcher.otlp.Replay, "send", send)
    watch(to)
    to.stop("RuntimeError")
    assert sent.is_set()


def test_an_export_that_fails_costs_a_line(
    to: Recorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*args: object, **kwargs: object) -> None:
        raise RuntimeError("to https://user:secret@host")

    monkeypatch.setattr(watcher.otlp.Replay, "send", send)
    watch(to)
    to.stop()
    assert "spans of this start were not exported: RuntimeError in " in caplog.text
    assert "secret" not in caplog.text
