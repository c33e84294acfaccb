"""``vllm-compile-ext report``: what people and programs read."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from tests import starts
from vllm_compile_ext.cli import app
from vllm_compile_ext.key import misses
from vllm_compile_ext.key.misses import Change
from vllm_compile_ext.store.store import Store

COLD, WARM, CRASHED = "20261118-110640-4bf92f", "20261118-120640-77a0c3", "20261118-130640-c0ffee"
LATEST = "20261118-150640-000000"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    found = starts.folder(tmp_path / "compile_starts")
    (found / "20261118-140640-dddddd.jsonl").unlink()
    return found


def cli(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.stdout or result.stderr


def test_listing(folder: Path) -> None:
    (folder / "20261118-140640-dddddd.jsonl").write_text("noise\n")
    lines = cli("ls").splitlines()
    assert lines[0].split() == ["start", "when", "model", "to", "ready", "outcome"]
    assert [line.split()[0] for line in lines[1:4]] == [CRASHED, WARM, COLD]
    assert "failed in weights" in lines[1]
    assert re.search(r"Llama-3.3-70B-Instruct +warm +64.0 s +ready", lines[2])
    assert lines[4] == f"3 starts in {folder}, 1 file cannot be read"
    data = json.loads(cli("ls", "--json"))
    assert data["unreadable"] == 1
    assert [line["outcome"] for line in data["starts"]] == ["failed", "ready", "ready"]
    assert data["starts"][0]["died"]["process"] == "worker 1"


@pytest.mark.parametrize("name", ["last~1", WARM, "20261118-12", "file"])
def test_one_start(folder: Path, name: str) -> None:
    out = cli(folder / f"{WARM}.jsonl" if name == "file" else name)
    assert "meta-llama/Llama-3.3-70B-Instruct  64.0 s to ready, warm start, 17.4 s faster than the cold start of" in out
    assert re.search(r"phase +before +now +share +change +ratio", out)
    assert re.search(r"■ imports +31\.68 +25\.35 +39\.6% +-6\.34 +0\.80x +█+▀", out)
    assert re.search(r"■ compile +9\.50 +- +- +-9\.50 +- +▀", out)
    assert re.search(r"total +81\.39 +63\.98 +100\.0% +-17\.41", out)
    assert "loaded 81 pieces of b818f53c0d22 in 80 ms  worker 0, worker 1\n" in out
    assert "99.8% of the time is inside named phases" in out


def test_lanes(folder: Path) -> None:
    lines = cli("last~2").splitlines()
    assert all(len(line) <= 100 for line in lines if "▏" in line)
    front = lines.index("front end (4100)")
    assert lines[front + 1].startswith("▏start")
    assert "▏imports" in lines[front + 2]
    assert "worker 1 (4302)" in lines


def test_where_a_start_ended_is_explained(folder: Path) -> None:
    crashed = cli()
    assert "failed in weights" in crashed
    assert "It ended in the phase weights (shard 1/6) of worker 1: OutOfMemoryError: CUDA out of memory." in crashed
    killed = cli(starts.killed().write(folder, LATEST))
    assert "killed in compile" in killed
    assert "It ended in the phase compile (piece 2/3) of worker 0, and said nothing of an error: it was" in killed


def test_a_start_that_is_still_running(folder: Path) -> None:
    """A file that was written so far, by a process that is there."""
    began = round(psutil.Process().create_time() * 1e9)
    made = starts.Recorder(time.time_ns() - 42 * 10**9)
    made.start(0)
    process = {"k": "process", "pid": os.getpid(), "ppid": 1, "kind": "worker", "rank": 3, "t": began}
    made.begin_span(None, os.getpid(), "Load weights", 0, "weights")

    def report(*args: str, **changes: object) -> str:
        path = made.write(folder, LATEST)
        with path.open("a") as file:
            file.write(json.dumps(process | changes) + "\n")
        return cli(*args)

    assert "killed in weights" in report()  # of another host
    out = report(host=os.uname().nodename)
    assert "still in weights" in out
    assert re.search(r"It is in the phase weights \(Load weights\) of worker 3, for 4\d\.\d s now", out)
    assert json.loads(report("ls", "--json", host=os.uname().nodename))["starts"][0]["outcome"] == "running"
    # The number was another process's then.
    assert "killed in weights" in report(host=os.uname().nodename, t=began - 10**12)


def test_json(folder: Path) -> None:
    data = json.loads(cli("last~1", "--json"))
    assert data["id"] == WARM
    assert data["other"]["id"] == COLD
    assert sum(row["seconds"] or 0 for row in data["phases"]) == pytest.approx(data["wall"], abs=1e-4)
    assert sum(row["other"] or 0 for row in data["phases"]) == pytest.approx(data["other"]["wall"], abs=1e-4)
    assert [process["title"] for process in data["processes"]] == ["front end", "engine core", "worker 0", "worker 1"]
    assert {note["name"] for note in data["notes"]} == {"key", "loaded", "graphs"}


def test_compare(folder: Path, tmp_path: Path) -> None:
    out = cli("--compare", COLD, "last~1")
    assert re.search(r"^A .*\n.*\nB ", out)
    assert re.search(r"phase +A +B +share +change +ratio", out)
    assert re.search(r"■ imports +31\.68 +25\.35 +39\.6% +-6\.34 +0\.80x", out)
    changed = starts.Recorder()
    changed.start(0, versions={"vllm": "0.33.0", "torch": "2.13.0+cu130", "plugin": "0.1.0", "python": "3.12.9"})
    path = changed.write(tmp_path, "other")
    assert "vllm: 0.32.0 -> 0.33.0" in cli("--compare", COLD, path)
    changed.line("ready", 70)
    changed.write(folder, LATEST)
    assert f"versions that differ from {WARM}\n  vllm: 0.32.0 -> 0.33.0\n" in cli("last")
    data = json.loads(cli("--compare", COLD, path, "--json"))
    assert data["different"] == {"versions": [["vllm", "0.32.0", "0.33.0"]], "options": [], "machine": []}
    assert (data["a"]["id"], data["b"]["id"]) == (COLD, "other")


def test_a_note_without_a_line_is_its_facts(folder: Path) -> None:
    made = starts.cold()
    made.note(99, starts.CORE, "graphs", captured=51, kind="FULL")
    assert "graphs: captured 51, kind FULL  engine core\n" in cli(made.write(folder, LATEST))


def test_a_miss_is_explained_by_the_store(folder: Path, tmp_path: Path) -> None:
    """Where the note does not say what differs."""
    made = starts.cold()
    made.lines = [line.replace('"changes"', '"ignored"').replace('"closest"', '"x"') for line in made.lines]
    made.write(folder, LATEST)
    changes = [Change("torch", "2.13.0", "2.13.1"), Change("vllm.new", None, "1")]
    store = Store.open(tmp_path / "compile_store")
    miss = misses.Miss(starts.KEY, "rank_0", starts.MODEL, {"torch": "2.13.1"}, starts.OLD_KEY, changes)
    misses.record(store.tree, miss)
    notes = [note for note in json.loads(cli("last", "--json"))["notes"] if note["name"] == "miss"]
    assert len(notes) == 2
    assert notes[0]["attrs"]["closest"] == starts.OLD_KEY
    assert notes[0]["attrs"]["changes"] == [["torch", "2.13.0", "2.13.1"], ["vllm.new", "unset", "1"]]


def test_files(folder: Path, tmp_path: Path) -> None:
    html, perfetto = tmp_path / "a.html", tmp_path / "a.json"
    cli("last~2", "--html", html, "--perfetto", perfetto)
    assert html.read_text().startswith("<!doctype html>")
    assert json.loads(perfetto.read_text())["traceEvents"]
    cli("--compare", COLD, WARM, "--html", html)
    assert "Before: the cold start of" in html.read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nope"], "has an id that begins with 'nope': see vllm-compile-ext report ls"),
        (["2026"], f"3 starts have ids that begin with '2026': give more of {COLD}, {WARM}, {CRASHED}"),
        (["last~7"], "'last~7' goes back too far, 3 starts recorded: see vllm-compile-ext report ls"),
        (["./none.jsonl"], "none.jsonl'"),
        (["last~x"], "begins with 'last~x'"),
        (["--html", "/none/a.html"], "No such file or directory: '/none/a.html'"),
        (["ls", "--html", "a.html"], "ls writes no file: name a start instead of it"),
        (["last", "--compare", "last", "last~1"], "--compare takes two starts, and 'last' is one more: leave it out"),
        (["--compare", "last", "last~1", "--perfetto", "x"], "--perfetto writes one start: leave --compare out"),
        (["--compare", "last", "nope"], "begins with 'nope'"),
    ],
)
def test_bad_input(folder: Path, args: list[str], words: str) -> None:
    out = cli(*args, code=1)
    assert words in out
    assert out.startswith("vllm-compile-ext: ")
    assert out.count("\n") == 1


def test_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    where = tmp_path / "compile_starts"
    assert cli(code=1).startswith(f"vllm-compile-ext: no start is recorded in {where}: start vLLM with")
    assert cli("ls") == f"0 starts in {where}\n"


def test_a_damaged_file(folder: Path) -> None:
    path = folder / f"{LATEST}.jsonl"
    path.write_bytes(starts.damaged())
    assert "7 lines of the file could not be read" in cli("last")
    path.write_bytes(b"\x00" * 64)
    assert "is not a recorded start: no line of it can be read" in cli("last", code=1)


def test_a_terminal_is_not_driven(folder: Path) -> None:
    made = starts.cold(model="evil\x1b[2J[red]model")
    made.line(
        "span", 1, id="e", parent=None, pid=9, name="\x1b]0;x\x07 [bold]", end=made.at(70), attrs={"phase": "\x1b[5m"}
    )
    made.note(2, 9, "fallback", "\x1b[2Jgone", why="\x1b[2Jgone")
    made.note(2, 9, "\x1b[2J", why="\x1b[2Jgone")
    path = made.write(folder, LATEST)
    for args in (["last"], [path], ["ls"], ["--compare", "last", "last~1"]):
        out = cli(*args)
        assert "\x1b" not in out
        assert "\x07" not in out
    assert "[red]model" in cli("last")
