"""What processes say, and how it looks: on a terminal that others write to, and in a log."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.screen import PYTHON, Screen, run
from vllm_compile_ext import run_folder
from vllm_compile_ext.record import display, progress
from vllm_compile_ext.record.progress import Progress, State

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(run_folder.VARIABLE, str(tmp_path))
    made = tmp_path / progress.NAME
    progress.start(made)
    return made


def test_the_last_word_counts(path: Path) -> None:
    engine, worker = Progress(), Progress()
    assert progress.read(path) is None, "nobody has spoken"
    engine.phase("spawn")
    worker.phase("weights")
    worker.advance(1, 3, "shards")
    found = progress.read(path)
    assert found is not None
    assert (found.phase, found.done, found.total, found.what) == ("weights", 1, 3, "shards")
    engine.phase("kv cache")
    found = progress.read(path)
    assert found is not None
    assert (found.phase, found.total) == ("kv cache", 0)
    assert time.time() - 60 < found.since <= time.time()


def test_spans_in_spans(path: Path) -> None:
    def now() -> str:
        found = progress.read(path)
        return found.phase if found else ""

    voice = Progress()
    voice.began("a", "compile")
    voice.began("b", "")
    voice.began("c", "load compiled code")
    assert now() == "load compiled code"
    voice.ended("c")
    assert now() == "compile"
    voice.ended("b")
    voice.ended("a")
    assert now() == "compile", "until something else begins"


def test_one_phase_in_many_spans_goes_on(path: Path) -> None:
    voice = Progress()
    voice.phase("weights")
    before = progress.read(path)
    voice.advance(2, 4)
    voice.began("a", "weights")
    after = progress.read(path)
    assert before is not None
    assert after == State("weights", before.since, 2, 4)


def test_nobody_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(run_folder.VARIABLE, raising=False)
    Progress().phase("weights")
    monkeypatch.setenv(run_folder.VARIABLE, str(tmp_path))
    voice = Progress()
    voice.phase("weights")
    voice.advance(1, 2)
    assert not voice.shown()
    assert not list(tmp_path.iterdir())


def test_no_longer_shown(path: Path) -> None:
    voice = Progress()
    voice.phase("weights")
    path.unlink()
    voice.phase("compile")
    voice.advance(1, 2)
    assert progress.read(path) is None


def test_a_second_start_of_a_process(path: Path) -> None:
    voice = Progress()
    voice.phase("weights")
    path.unlink()
    voice.phase("ready")
    progress.start(path)
    voice.phase("config")
    found = progress.read(path)
    assert found is not None
    assert found.phase == "config"


def test_a_server_among_several_ends_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen:
        def __init__(self) -> None:
            self.phases: list[str] = []
            self.closed = False

        def show(self, state: State, elapsed: float) -> None:
            self.phases.append(state.phase)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(display, "TICK", 0.01)
    seen = Seen()
    shown = display.Display(path, seen, time.time())
    shown.start()
    other = Progress()
    other.phase("api server")
    time.sleep(0.2)
    other.phase(display.READY)
    shown._thread.join(10)
    assert seen.phases[-1] == "api server"
    assert seen.closed
    shown.stop()
    shown.stop()


def test_long_names_and_damage(path: Path) -> None:
    voice = Progress()
    voice.phase("\N{SNOWMAN}" * 1000)
    assert progress.read(path) is not None
    path.write_bytes(b'["weights", 1')
    assert progress.read(path) is None


def test_a_log_gets_a_line_every_ten_seconds(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    clock = [1000.0]
    monkeypatch.setattr(display.time, "time", lambda: clock[0])
    log = display.Log()
    for second in range(100):
        clock[0] = 1000.0 + second / 2  # 20 s of weights, 5 s of config, 25 s of compile
        phase, since = (
            ("weights", 1000.0) if second < 40 else ("config", 1020.0) if second < 50 else ("compile", 1025.0)
        )
        log.show(State(phase, since, 1, 3 if phase == "compile" else 0, "pieces"), clock[0] - 990)
    assert [record.message for record in caplog.records] == [
        "starting for 20 s: loading weights for 10 s",
        "starting for 45 s: compiling for 10 s (1 of 3 pieces)",
        "starting for 55 s: compiling for 20 s (1 of 3 pieces)",
    ]


# A start whose processes write what vLLM's do, all at once: log lines, bars of tqdm, raw bytes, long lines.
PROGRAM = """if True:
    import logging, os, subprocess, sys, time
    from vllm_compile_ext import run_folder
    from vllm_compile_ext.record import display, progress
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    LINES = 150
    OTHER = '''if True:
        import os, sys, time
        from tqdm import tqdm
        from vllm_compile_ext.record import progress
        name, bar = sys.argv[1:]
        progress.phase(f"phase of {name}")
        for n in range(150):
            os.write(1, f"<{name} {n} {'x' * (n % 150)}>\\\\n".encode())
            progress.advance(n, 150, "lines")
            time.sleep(0.01)
        if bar:
            for n in tqdm(range(40), desc="Loading shards", ncols=60):
                time.sleep(0.01)
    '''
    run_folder.make()
    display.TICK = 0.02
    display.show(time.time() - 5)
    print("before", flush=True)
    children = [subprocess.Popen([sys.executable, "-c", OTHER, name, ""]) for name in ("engine", "worker")]
    for child in children:
        child.wait()
    subprocess.run([sys.executable, "-c", OTHER, "loader", "bar"])
    if "crash" in sys.argv:
        raise RuntimeError("the start failed")
    if "wait" in sys.argv:
        print("waiting", flush=True)
        time.sleep(60)
    display.hide()
    print("after", flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "start.py"
    path.write_text(PROGRAM)
    return [PYTHON, str(path)]


def everything(screen: Screen) -> str:
    return "\n".join([*screen.scrolled, *screen.lines()])


def check_restored(screen: Screen) -> None:
    assert (screen.top, screen.bottom) == (0, screen.rows - 1), "the whole screen scrolls again"
    assert "vLLM is starting" not in everything(screen), "nothing of the line is left"


def test_no_line_of_any_process_is_garbled(program: list[str]) -> None:
    screen, seen = Screen(24, 100), set()

    def watch(process: int) -> None:
        last = screen.lines()[-1]
        seen.add(last.split("|")[1].split(" s")[0].rstrip("0123456789 ") if last.count("|") else last)
        assert not any("vLLM is starting" in line for line in screen.lines()[:-1])

    env = {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    assert run(program, screen, env=env, watch=watch) == 0
    check_restored(screen)
    text = everything(screen).replace("\n", "")
    for name in ("engine", "worker", "loader"):
        for n in range(150):
            assert f"<{name} {n} {'x' * (n % 150)}>" in text
        assert any(f"phase of {name}" in line for line in seen), "the line has shown each"
    assert text.startswith("before")
    assert text.endswith("after")
    assert everything(screen).count("Loading shards: 100%") == 1, "a bar stays on its line"


@pytest.mark.parametrize("how", ["crash", "interrupt"])
def test_the_terminal_is_restored(program: list[str], how: str) -> None:
    screen, sent = Screen(20, 80), []

    def watch(process: int) -> None:
        if how == "interrupt" and not sent and "waiting" in "\n".join(screen.lines()):
            assert screen.bottom == screen.rows - 2
            sent.append(process)
            os.kill(process, signal.SIGINT)

    env = {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    assert run([*program, "crash" if how == "crash" else "wait"], screen, env=env, watch=watch) != 0
    check_restored(screen)
    error = "RuntimeError: the start failed" if how == "crash" else "KeyboardInterrupt"
    assert error in everything(screen)


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_gets_plain_lines(program: list[str], term: str) -> None:
    screen = Screen(24, 100)
    assert run(program, screen, env={"PYTHONPATH": str(ROOT), "TERM": term}) == 0
    assert everything(screen).strip().endswith("after")


def test_without_a_terminal_there_is_no_control_sequence(program: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run(program, env=env, capture_output=True, check=True)
    assert b"\x1b" not in done.stdout + done.stderr.replace(b"\x1b[A", b"")


def test_a_hidden_log_hides_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display.run_folder, "is_owner", lambda: True)
    monkeypatch.setattr(display.logger, "level", logging.WARNING)
    display.logger.manager._clear_cache()
    display.show(time.time())
    assert display._display is None
    display.logger.manager._clear_cache()


def test_switched_off(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(display.run_folder, "is_owner", lambda: True)
    monkeypatch.setenv("VLLM_COMPILE_PROGRESS", "0")
    display.show(time.time())
    assert display._display is None


def test_importing_it_is_the_standard_library() -> None:
    code = "import sys, vllm_compile_ext.record.display; print({'torch', 'vllm', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
