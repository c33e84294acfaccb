"""``vllm-compile-ext bench`` with a program in vLLM's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from tests.process import ROOT
from tests.unit.cli.test_program import gone, ignore
from vllm_compile_ext.cli import app, bench
from vllm_compile_ext.cli.bench import figures, server, starts
from vllm_compile_ext.cli.bench.starts import Start

FAKE = [sys.executable, str(Path(__file__).with_name("fake_vllm.py"))]


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "tmp"
    made.mkdir()
    monkeypatch.setattr(bench.tempfile, "gettempdir", lambda: str(made))
    monkeypatch.setattr(server, "vllm_command", lambda: FAKE)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "started"))
    return made


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "160"})


def started(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "started").read_text().splitlines()]


def test_everything(tmp_path: Path, temporary_folder: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    files = ["--json", str(out), "--chart", str(picture)]
    result = invoke("org/model", "--runs", "2", "-tp", "2", *files, "-cc.mode=3")
    assert result.exit_code == 0, result.output
    ran = started(tmp_path)
    kinds = ["eager" if each["eager"] else "cold" if each["cold"] else "warm" for each in ran]
    assert kinds == ["eager", *["cold", "cold", "warm", "warm", "eager", "eager"] * 2], "the first is not measured"
    assert [each["ours"] for each in ran] == [False, *[False, True] * 3, *[True, False] * 3]
    assert all(each["arguments"][:4] == ["serve", "org/model", "-tp", "2"] for each in ran)
    assert len({each["root"] for each in ran}) == 5, "each side of each round has caches of its own"
    assert all(each["home"].startswith(str(temporary_folder)) for each in ran)
    assert {each["hf"] for each in ran} == {os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))}
    assert all(gone(each["child"]) for each in ran)
    assert not list(temporary_folder.iterdir())
    assert "[1/12] stock cold: compiling or loading\n" in result.stderr
    assert "[12/12] stock eager: done\n" in result.stderr

    data = json.loads(out.read_text())
    assert (data["runs"], data["measured"], len(data["starts"])) == (2, "vllm serve", 12)
    medians = {(each["side"], each["kind"], each["figure"]): each["median"] for each in data["summary"]}
    assert medians["stock", "cold", "compile"] == 10.25
    assert medians["ours", "warm", "compile"] == 0.01
    assert ("ours", "eager", "compile") not in medians
    assert medians["ours", "eager", "init"] == 12.5
    assert medians["ours", "cold", "ready"] > 0
    text = " ".join(result.stdout.split())
    assert "ours cold" in text
    assert "1.50 s (1.50-1.50) 0.15x" in text
    drawn = [element.text for element in ElementTree.parse(picture).iter() if element.text]
    assert "vllm serve model: ready" in drawn
    assert {f"{kind}, {side}" for kind in starts.KINDS for side in starts.SIDES} <= set(drawn)


@pytest.mark.parametrize(
    ("what", "arguments", "count", "why"),
    [
        ("fail", ("--runs", "1"), 3, "[2/6] ours cold: vllm serve ended with status 1 before it was ready"),
        ("fail eager", (), 1, "one start that is not measured: vllm serve ended with status 1"),
        ("hang", ("--limit", "1"), 1, "one start that is not measured: vllm serve was not ready after 1 s"),
    ],
)
def test_a_start_that_fails_ends_it(
    what: str,
    arguments: tuple[str, ...],
    count: int,
    why: str,
    tmp_path: Path,
    temporary_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE", what)
    out = tmp_path / "out.json"
    result = invoke("m", "--json", str(out), *arguments)
    assert result.exit_code == 1
    assert f"vllm-compile-ext: {why}" in result.stderr
    if what != "hang":
        assert result.stderr.index("ERROR no such kernel") < result.stderr.index("ERROR really")
    assert not out.exists()
    assert not list(temporary_folder.iterdir())
    assert len(started(tmp_path)) == count
    assert all(gone(each["child"]) for each in started(tmp_path))


def test_interrupted_it_takes_everything_along(tmp_path: Path, temporary_folder: Path) -> None:
    code = f"""if True:
        from vllm_compile_ext.cli.bench import server
        server.vllm_command = lambda: {FAKE!r}
        from vllm_compile_ext.cli import app
        app(["bench", "m"])
    """
    env = {**os.environ, "FAKE": "hang", "TMPDIR": str(temporary_folder)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=ignore(signal.SIGHUP)
    )
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in message
    assert gone(started(tmp_path)[0]["child"])
    assert not list(temporary_folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "name a model"),
        (["m", "--starts", "cold,hot"], "hot is none of cold, warm, eager"),
        (["m", "--starts", "warm"], "needs the cold one"),
        (["m", "--json", "/no/such/folder/x.json"], "cannot be written"),
        (["m", "--chart", "x.gif"], "ends in .svg or .png"),
        (["m", "--runs", "0"], "greater than or equal to 1"),
    ],
)
def test_mistakes_are_said_at_once(tmp_path: Path, arguments: list[str], why: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.replace("\u2502", "").split())
    assert not (tmp_path / "started").exists()


def test_caches_are_new_and_the_rest_is_the_users(tmp_path: Path) -> None:
    mine = {"HOME": "/home/me", "HF_TOKEN": "t", "VLLM_ATTENTION_BACKEND": "X", "VLLM_CACHE_ROOT": "/c"}
    mine |= {"TRITON_CACHE_DIR": "/t", "XDG_CACHE_HOME": "/x", "VLLM_COMPILE_STORE": "/s", "VLLM_COMPILE_EXT": "0"}
    env = starts.environment(tmp_path, "ours", mine)
    assert (env["HF_TOKEN"], env["VLLM_ATTENTION_BACKEND"], env["VLLM_COMPILE_EXT"]) == ("t", "X", "1")
    assert env["HF_HOME"] == "/x/huggingface"
    assert not {"TRITON_CACHE_DIR", "XDG_CACHE_HOME", "VLLM_COMPILE_STORE"} & env.keys()
    assert all(Path(env[name]).is_relative_to(tmp_path) for name in ("HOME", "VLLM_CACHE_ROOT"))
    assert starts.environment(tmp_path, "stock", {"HF_HOME": "/h"})["HF_HOME"] == "/h"


def test_median_spread_and_ratio() -> None:
    measured = [Start(n, "cold", "stock", {"ready": seconds}) for n, seconds in enumerate((40.0, 90.0, 41.0))]
    stock, ours = figures.summaries([*measured, Start(0, "cold", "ours", {"ready": 4.123})], starts.SERVE)
    assert (stock.median, stock.least, stock.most, stock.count) == (41.0, 40.0, 90.0, 3)
    assert figures.cell(stock, None) == "41.0 s (40.0-90.0)"
    assert figures.cell(ours, stock) == "4.12 s 0.10x"
    assert figures.cell(None, stock) == "-"
    assert figures.seconds(0.0214) == "0.021"


def test_a_chart_shows_names_as_they_are_and_may_be_a_png(tmp_path: Path) -> None:
    made = figures.summaries([Start(1, "cold", "stock", {"ready": 120.0})], starts.SERVE)
    figures.draw(tmp_path / "x.svg", made, "<m> & $more$", ["machine"])
    text = {element.text for element in ElementTree.parse(tmp_path / "x.svg").iter()}
    assert {"<m> & $more$", "120.0 s", "machine"} <= text
    figures.draw(tmp_path / "x.png", made, "m", [])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_without_matplotlib_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    result = invoke("m", "--chart", "x.svg")
    assert result.exit_code == 2
    assert 'pip install "vllm-compile-ext[chart]"' in " ".join(result.stderr.replace("\u2502", "").split())
    assert not (tmp_path / "started").exists()
