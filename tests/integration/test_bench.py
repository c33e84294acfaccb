"""``vllm-compile-ext bench`` with real engines: a first start, stock and ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serve import MEMORY_SHARE, environment

pytestmark = pytest.mark.engine

ARGS = (
    *("--max-num-batched-tokens", "256", "--max-model-len", "256", "--gpu-memory-utilization", str(MEMORY_SHARE)),
    *("--port", "1", "--api-key", "of the server, and ignored"),
)


def test_engine(llama2: Path, tmp_path: Path) -> None:
    out, picture, temporary = tmp_path / "out.json", tmp_path / "out.svg", tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "vllm_compile_ext.cli", "bench", str(llama2), "--engine", "--runs", "1"]
    command += ["--starts", "cold", "--json", str(out), "--chart", str(picture), *ARGS]
    env = environment(tmp_path / "mine", {"TMPDIR": str(temporary)})
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ours cold" in done.stdout
    data = json.loads(out.read_text())
    assert data["measured"] == "vllm bench startup"
    stock, ours = data["starts"]
    assert (stock["side"], ours["side"]) == ("stock", "ours")
    assert stock["figures"]["startup"] > 0  # on CPU it does not tell how long it compiled
    assert 0 < ours["figures"]["compile"] < ours["figures"]["startup"]
    assert picture.exists()
    assert list(temporary.glob("vllm-compile-ext-*")) == []
    assert {path.name for path in tmp_path.glob("mine/*")} <= {"metadata"}, "the user's caches are left alone"
