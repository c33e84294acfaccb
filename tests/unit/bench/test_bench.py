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

from tests import screen
from vllm_compile_ext.bench import chart, figures, server, starts
from vllm_compile_ext.bench.figures import Summary
from vllm_compile_ext.bench.starts import Start, order
from vllm_compile_ext.cli import app, bench

FAKE = [sys.executable, str(Path(__file__).with_name("fake_vllm.py"))]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "tmp"
    made.mkdir()
    monkeypatch.setattr(bench.tempfile, "gettempdir", lambda: str(made))
    monkeypatch.setattr(server, "vllm_command", lambda: FAKE)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "told"))
    return made


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "160"})


def told(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def gone(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_stock_and_ours_take_turns() -> None:
    found = [(start.round, start.kind, start.side) for start in order(2, ("warm", "cold"))]
    assert found == [
        *((1, "cold", "stock"), (1, "cold", "ours"), (1, "warm", "stock"), (1, "warm", "ours")),
        *((2, "cold", "ours"), (2, "cold", "stock"), (2, "warm", "ours"), (2, "warm", "stock")),
    ]


def test_everything(tmp_path: Path, temporary_folder: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    result = invoke(
        *("org/model", "--runs", "2", "-tp", "2", "--json", str(out), "-cc.mode=3", "--chart", str(picture))
    )
    assert result.exit_code == 0, result.output
    ran = told(tmp_path)
    kinds = ["eager" if each["eager"] else "cold" if each["cold"] else "warm" for each in ran]
    assert kinds == ["eager", *["cold", "cold", "warm", "warm", "eager", "eager"] * 2], "the first is not measured"
    assert [each["ours"] for each in ran] == [False, *[False, True] * 3, *[True, False] * 3]
    assert all(each["arguments"][:4] == ["serve", "org/model", "-tp", "2"] for each in ran)
    assert len({each["root"] for each in ran}) == 5, "each side of each round has caches of its own"
    assert all(each["home"].startswith(str(temporary_folder)) for each in ran)
    assert {each["hf"] for each in ran} == {os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))}
    assert all(gone(each["child"]) for each in ran)
    assert not list(temporary_folder.iterdir())

    data = json.loads(out.read_text())
    assert (data["runs"], data["measured"], len(data["starts"])) == (2, "vllm serve", 12)
    medians = {(each["side"], each["kind"], each["figure"]): each["median"] for each in data["summary"]}
    assert medians["stock", "cold", "compile"] == 10.25
    assert medians["ours", "warm", "compile"] == 0.01
    assert ("ours", "eager", "compile") not in medians
    assert medians["ours", "eager", "init"] == 12.5
    assert 0 < medians["ours", "cold", "ready"] < 30
    text = " ".join(result.stdout.split())
    assert "ours cold" in text
    assert "1.50 s (1.50-1.50) 0.15x" in text
    ElementTree.fromstring(picture.read_text())


def test_a_start_that_fails_shows_why(tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "fail")
    out = tmp_path / "out.json"
    result = invoke("m", "--runs", "1", "--json", str(out))
    assert result.exit_code == 1
    assert result.stderr.index("ERROR no such kernel") < result.stderr.index("ERROR really")
    assert "error: [2/6] ours cold: vllm serve ended with status 1 before it was ready" in result.stderr
    assert not out.exists()
    assert not list(temporary_folder.iterdir())
    assert all(gone(each["child"]) for each in told(tmp_path))


def test_a_bad_option_fails_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "fail eager")
    result = invoke("m")
    assert result.exit_code == 1
    assert "error: one start that is not measured: vllm serve ended with status 1" in result.stderr
    assert len(told(tmp_path)) == 1


def test_a_start_takes_no_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "hang")
    result = invoke("m", "--limit", "1")
    assert result.exit_code == 1
    assert "was not ready after 1 s" in result.stderr
    assert gone(told(tmp_path)[0]["child"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_takes_everything_along(tmp_path: Path, number: int, status: int) -> None:
    code = f"""if True:
        import faulthandler, signal
        faulthandler.register(signal.SIGUSR1)
        from vllm_compile_ext.bench import server
        server.vllm_command = lambda: {FAKE!r}
        from vllm_compile_ext.cli import app
        app(["bench", "m"])
    """
    place = tmp_path / "its"
    place.mkdir()
    env = {**os.environ, "FAKE": "hang", "FAKE_LOG": str(tmp_path / "told"), "TMPDIR": str(place)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=screen.listen,
    )
    while not (tmp_path / "told").exists() or not (tmp_path / "told").read_text():
        time.sleep(0.05)
    process.send_signal(number)
    try:
        said = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:  # say where it is
        signals = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "Sig" in line]
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        process.kill()
        pytest.fail("\n".join([*signals, process.communicate()[1]]))
    assert process.returncode == status
    assert "Traceback" not in said
    assert gone(told(tmp_path)[0]["child"])
    assert not list(place.iterdir())


def test_a_server_is_ended_also_where_an_interrupt_left_popens_lock_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STOP_TIMEOUT", 0.5)
    monkeypatch.setattr(server, "STOP_TIMEOUT_STARTING", 0.1)
    with server.Program(["sleep", "1000"], tmp_path / "log", os.environ) as program:
        program._process._waitpid_lock.acquire()  # type: ignore[attr-defined]
    assert gone(program._process.pid)


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
    assert not (tmp_path / "told").exists()


def test_a_png_without_matplotlib_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(chart.ChartError, match=r"pip install \"vllm-compile-ext\[chart\]\""):
        chart.check(Path("x.png"))
    chart.check(Path("x.svg"))


def test_caches_are_new_and_the_rest_is_the_users(tmp_path: Path) -> None:
    mine = {"HOME": "/home/me", "HF_TOKEN": "t", "VLLM_ATTENTION_BACKEND": "X", "VLLM_CACHE_ROOT": "/c"}
    mine |= {"TRITON_CACHE_DIR": "/t", "XDG_CACHE_HOME": "/x", "VLLM_COMPILE_STORE": "/s", "VLLM_COMPILE_EXT": "0"}
    env = starts.environment(tmp_path, "ours", mine)
    assert (env["HF_TOKEN"], env["VLLM_ATTENTION_BACKEND"], env["VLLM_COMPILE_EXT"]) == ("t", "X", "1")
    assert env["HF_HOME"] == "/x/huggingface"
    assert not {"TRITON_CACHE_DIR", "XDG_CACHE_HOME", "VLLM_COMPILE_STORE"} & env.keys()
    assert all(Path(env[name]).is_relative_to(tmp_path) for name in ("HOME", "VLLM_CACHE_ROOT"))
    assert starts.environment(tmp_path, "stock", {"HF_HOME": "/h"})["HF_HOME"] == "/h"


def summary(kind: Any, side: Any, *values: float) -> Summary:
    made = [Start(n, kind, side, {"ready": value}) for n, value in enumerate(values)]
    return figures.summaries(made, starts.SERVE)[0]


def test_median_and_spread() -> None:
    stock, ours = summary("cold", "stock", 40.0, 90.0, 41.0), summary("cold", "ours", 4.123)
    assert (stock.median, stock.least, stock.most, stock.count) == (41.0, 40.0, 90.0, 3)
    assert figures.cell(stock, None) == "41.0 s (40.0-90.0)"
    assert figures.cell(ours, stock) == "4.12 s 0.10x"
    assert figures.cell(None, stock) == "-"
    assert figures.seconds(0.0214) == "0.021"


@pytest.mark.parametrize("most", [0.004, 0.07, 0.9, 1.0, 3.3, 9.99, 10, 42, 99, 130, 999, 5000])
def test_an_axis_has_a_few_round_marks(most: float) -> None:
    end, step = chart.axis(most)
    assert most <= end <= 2 * most + step
    assert 1 <= end / step <= 8


def test_the_chart_shows_every_bar_inside() -> None:
    made = [
        *(summary("cold", "stock", 100, 120, 155), summary("cold", "ours", 30, 31, 33)),
        *(summary("warm", "stock", 85), summary("warm", "ours", 35)),
    ]
    picture = ElementTree.fromstring(chart.svg(made, "vllm serve <m> & more: ready", ["machine"]))
    rectangles = picture.findall("{http://www.w3.org/2000/svg}rect")
    assert len(rectangles) == 4
    edges = [float(each.get("x", 0)) + float(each.get("width", 0)) for each in rectangles]
    assert max(edges) < chart.WIDTH - chart.RIGHT + 1
    assert edges[0] > edges[2] > edges[1]
    text = "".join(picture.itertext())
    assert "vllm serve <m> & more" in text
    assert "120.0 s (100.0-155.0)" in text


def test_a_png_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart.write(tmp_path / "x.png", [summary("cold", "ours", 1, 2, 3)], "title", ["caption"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
