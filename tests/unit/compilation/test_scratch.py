"""What a process does before its first model, and where it compiles."""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_compile_ext import temporary
from vllm_compile_ext.compilation import decorators


@pytest.mark.parametrize(("parent", "expected"), [(None, ["collect", "freeze"]), (object(), ["freeze"])])
def test_imports_are_frozen_once_and_a_users_garbage_is_collected_before(
    monkeypatch: pytest.MonkeyPatch, parent: object, expected: list[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(decorators, "_upstream_decorate", lambda cls: cls)
    monkeypatch.setattr(decorators.multiprocessing, "parent_process", lambda: parent)
    decorators._freeze_imports.cache_clear()
    for _ in range(2):
        decorators._support_torch_compile(type("Model", (), {"save_aot_compiled_function": None}))
    decorators._freeze_imports.cache_clear()
    assert calls == expected


@pytest.mark.parametrize(("name", "there"), [("cache", True), ("Größe_1", True), ("a b", False), ("it's", False)])
def test_a_name_that_inductors_compiler_does_not_get_right_is_not_used(
    tmp_path: Path, name: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=envs))
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    at_the_end = []
    monkeypatch.setattr(temporary.atexit, "register", at_the_end.append)
    found = temporary.scratch.__wrapped__()
    assert found.is_relative_to(tmp_path / name) == there
    assert there or found.parent == Path(tempfile.gettempdir())
    assert found.stat().st_mode & 0o777 == 0o700
    (remove,) = at_the_end
    remove()
    assert not found.exists()
