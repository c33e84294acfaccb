"""Programs in sessions of their own, and what signals do to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.process import ROOT
from vllm_compile_ext.cli import program
from vllm_compile_ext.cli.program import Program, ProgramError, excerpt

# A family: a child in a process group of its own, and one that ignores SIGTERM; it prints both.
FAMILY = """if True:
    import os, signal, subprocess, sys, time
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, process_group=0)
    child.stdout.readline()
    print(child.pid, flush=True)
    {end}
"""
# A command that runs `FAMILY` until it is told to end.
COMMAND = """if True:
    import os, sys
    from vllm_compile_ext.cli.program import Program, interruptible
    def listen(line):
        print(line.text, flush=True)
    with interruptible(), Program([sys.executable, "-c", sys.argv[1]], os.environ, listen=listen) as program:
        program.wait()
"""


def family(end: str) -> list[str]:
    return [sys.executable, "-c", FAMILY.format(end=end)]


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    heard: list[str] = []
    log = tmp_path / "log"
    with Program(family("sys.exit(3)"), os.environ, log=log, listen=lambda line: heard.append(line.text)) as ran:
        assert ran.wait() == 3
    assert [line.text for line in ran.lines] == heard == log.read_text().splitlines()
    assert gone(int(heard[0]))


def test_left_it_is_ended_also_when_it_ignores_the_polite_signal() -> None:
    with Program(family("time.sleep(600)"), os.environ) as ran:
        while not ran.lines:
            time.sleep(0.01)
        with pytest.raises(ProgramError, match="not done after 0 s") as error:
            ran.wait(0)
    assert error.value.lines == [ran.lines[0].text]
    assert gone(ran.pid)
    assert gone(int(ran.lines[0].text))


def test_a_listener_whose_terminal_is_gone_does_not_hold_it_up() -> None:
    def listen(line: program.Line) -> None:
        raise OSError(5, "Input/output error")

    code = "for number in range(20000): print(number, 'x' * 20)"  # more than a pipe holds
    with Program([sys.executable, "-c", code], os.environ, listen=listen) as ran:
        assert ran.wait(60) == 0
    assert len(ran.lines) == 20000


def ignore(*ignored: int) -> Callable[[], None]:
    """For a process to be: the signals that it ignores; the others are heard, however these tests were started."""

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    return prepare


@pytest.mark.parametrize(
    ("ignored", "sent", "status"),
    [
        ((), [signal.SIGINT], 130),
        ((), [signal.SIGTERM], 143),
        ((), [signal.SIGHUP], 129),
        ((signal.SIGINT,), [signal.SIGINT, signal.SIGTERM], 143),  # a script's background job
        ((signal.SIGINT, signal.SIGHUP), [signal.SIGHUP, signal.SIGTERM], 143),  # nohup
    ],
)
def test_a_signal_takes_everything_along(ignored: tuple[int, ...], sent: list[int], status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, FAMILY.format(end="time.sleep(600)")],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # without a terminal
        preexec_fn=ignore(*ignored),
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    for number in sent:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (status, "interrupted; what was started has been ended\n")
    assert gone(child)


def test_an_excerpt_begins_with_the_process_that_failed_first() -> None:
    worker = [f"(Worker pid=7) ERROR 11-24 [x.py] line {n}" for n in range(30)]
    log = ["(EngineCore pid=6) INFO hello", *worker, "(EngineCore pid=6) ERROR a worker failed", "Traceback"]
    assert excerpt(log) == worker[-program.EXCERPT :]
    assert excerpt(log[:1]) == log[:1]
