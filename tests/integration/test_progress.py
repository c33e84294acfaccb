"""A real ``vllm serve`` on a terminal: the line below, vLLM's own lines and bars above."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from benchmarks.serve import MEMORY_SHARE, environment
from tests.screen import Screen, run
from vllm_compile_ext.bench.server import HOST, free_port, vllm_command

pytestmark = pytest.mark.engine

ARGS = (
    *("--dtype", "float32", "--max-num-batched-tokens", "256", "--max-model-len", "256"),
    *("--gpu-memory-utilization", str(MEMORY_SHARE)),
)
READY = "Application startup complete"
BEGINS = re.compile(r"\([\w-]+ pid=\d+\) (INFO|WARNING) ")  # a line of vLLM's log, from any process


def test_vllms_lines_are_whole_and_the_phases_are_shown(llama2: Path, tmp_path: Path) -> None:
    screen, shown, ready = Screen(30, 400), set(), []

    def watch(process: int) -> None:
        lines = screen.lines()
        if " | " in lines[-1] and not ready:
            shown.add(re.sub(r" \d+ s$", "", lines[-1].split(" | ")[1]))
            assert "vLLM is starting" in lines[-1]
        if not ready and any(READY in line for line in lines):
            ready.append(process)
        if len(ready) == 1 and "ready" in "".join(lines):
            ready.append(process)
            os.kill(process, signal.SIGINT)

    where = ("--host", HOST, "--port", str(free_port()))
    env = environment(tmp_path, {"COLUMNS": "400"}) | {"TERM": "xterm"}
    assert run([*vllm_command(), "serve", str(llama2), *ARGS, *where], screen, env=env, watch=watch, timeout=300) == 0
    assert {"importing in another process", "compiling"} <= shown
    assert (screen.top, screen.bottom) == (0, screen.rows - 1)
    lines = [*screen.scrolled, *screen.lines()]
    assert not any("vLLM is starting" in line for line in lines), "nothing of it is left"
    assert any(READY in line for line in lines)
    bars = [line for line in lines if "Loading safetensors" in line]
    assert bars
    assert all(re.fullmatch(r"Loading safetensors.*it/s\]", line) for line in bars), bars
    begins = [line for line in lines if re.search(r"(INFO|WARNING) \d\d-\d\d \d\d:\d\d:\d\d \[", line)]
    assert len(begins) > 50
    assert [line for line in begins if not BEGINS.match(line)] == []
