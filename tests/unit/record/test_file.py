"""The file of a start: where it is, the last few, what a full or forbidden folder costs."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_compile_ext.record import file
from vllm_compile_ext.record.file import StartFile, encode

TRACE = "abcdef" + "0" * 26


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return tmp_path / "compile_starts"


def test_private_and_named_by_time_and_trace(folder: Path) -> None:
    log = StartFile.create(TRACE)
    assert log is not None
    assert log.path.name.endswith("-abcdef.jsonl")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_the_last_twenty_are_kept(folder: Path) -> None:
    folder.mkdir()
    for number in range(25):
        (folder / f"20260101-0000{number:02}-aaaaaa.jsonl").write_text("")
    log = StartFile.create(TRACE)
    assert log is not None
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == file.KEPT
    assert left[0] == "20260101-000006-aaaaaa.jsonl"
    assert log.path.name in left


def test_a_file_that_is_gone_is_not_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert StartFile.join(tmp_path / "gone.jsonl") is None
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_processes_that_write_at_once_do_not_mix_lines(tmp_path: Path) -> None:
    log = StartFile.create(TRACE)
    assert log is not None
    code = (
        "import sys, pathlib; from vllm_compile_ext.record.file import StartFile, encode\n"
        "log = StartFile.join(pathlib.Path(sys.argv[1]))\n"
        "for i in range(300): log.write(encode({'k': 'note', 'who': sys.argv[2], 'i': i, 'pad': 'x' * 500}))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(log.path), str(n)]) for n in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    for who in "012":
        assert [line["i"] for line in lines if line["who"] == who] == list(range(300))


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "compile_starts").write_text("")
    assert StartFile.create(TRACE) is None
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "VLLM_COMPILE_STARTS=0" in record.message


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_costs_one_warning_of_all_processes(room: int, caplog: pytest.LogCaptureFixture) -> None:
    """room: for so many bytes of the next line."""
    log = StartFile.create(TRACE)
    assert log is not None
    others = [StartFile.join(log.path) for _ in range(2)]
    log.write(encode({"k": "note"}))
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        for one in [log, *others]:
            assert one is not None
            one.write(b"{}\n")
            one.write(b"{}\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write(b"{}\n")
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert log.path.read_bytes() == before + b"{}"[:room]


def test_what_json_does_not_know_is_its_text() -> None:
    assert json.loads(encode({"a": Path("x"), "b": {1}, "c": float(1)})) == {"a": "x", "b": "{1}", "c": 1.0}


def test_there_is_an_end_to_what_one_process_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "MAX_BYTES", 1000)
    log = StartFile.create(TRACE)
    assert log is not None
    for _ in range(100):
        log.write(b"x" * 99 + b"\n")
    assert log.path.stat().st_size == 1100
