"""Where Inductor works."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_compile_ext.compilation import scratch


@pytest.mark.parametrize(("name", "there"), [("cache", True), ("Größe_1", True), ("a b", False), ("it's", False)])
def test_a_name_that_inductors_compiler_does_not_get_right_is_not_used(
    tmp_path: Path, name: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=envs))
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    at_the_end = []
    monkeypatch.setattr(scratch.atexit, "register", at_the_end.append)
    found = scratch.folder.__wrapped__()
    assert found.is_relative_to(tmp_path / name) == there
    assert there or found.parent == Path(tempfile.gettempdir())
    assert found.stat().st_mode & 0o777 == 0o700
    (remove,) = at_the_end
    remove()
    assert not found.exists()
