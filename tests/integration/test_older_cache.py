"""Upstream's older cache, which `VLLM_USE_AOT_COMPILE=0` asks for, damaged: a warning, and compiled again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import engine

pytestmark = pytest.mark.engine


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_older_cache_without_aot(llama2: Path, tmp_path: Path) -> None:
    """``VLLM_USE_AOT_COMPILE=0``: Dynamo's bytecode hook and upstream's index of compiled pieces."""
    root, env = tmp_path / "root", {"VLLM_USE_AOT_COMPILE": "0"}
    cold = engine.run(llama2, root, fork=True, VLLM_COMPILE_DEPYF="1", **env)
    assert cold.counters["num_cache_entries_updated"] == 3
    assert cold.decompiled == ["forward"]
    assert "def forward" in (Path(cold.folder) / "transformed_code.py").read_text()

    index = Path(cold.folder) / "vllm_compile_cache.py"
    piece = sorted(Path(cold.folder).glob("artifact_*"))[0]
    index_text = index.read_text()
    truncate(index)
    run = engine.run(llama2, root, fork=True, **env)
    assert run.output.lines("WARNING", "compiling again", str(index))
    assert run.tokens == cold.tokens
    assert run.decompiled == []

    index.write_text(index_text)
    shutil.rmtree(piece) if piece.is_dir() else truncate(piece)
    run = engine.run(llama2, root, fork=True, **env)
    assert run.output.lines("WARNING", "compiling again", piece.name)
    assert run.tokens == cold.tokens
