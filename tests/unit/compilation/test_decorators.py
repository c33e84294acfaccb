"""What happens to a process before its first model."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from vllm_compile_ext.compilation import decorators


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the garbage collector was asked for, in a process that has no model yet."""
    made: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: made.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: made.append("freeze"))
    monkeypatch.setattr(decorators, "_upstream_decorate", lambda cls: cls)
    decorators._freeze_imports.cache_clear()
    yield made
    decorators._freeze_imports.cache_clear()


def decorate() -> type:
    return decorators._support_torch_compile(type("Model", (), {"save_aot_compiled_function": None}))


@pytest.mark.parametrize(("parent", "expected"), [(None, ["collect", "freeze"]), (object(), ["freeze"])])
def test_imports_are_frozen_once_and_a_users_garbage_is_collected_before(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, parent: object, expected: list[str]
) -> None:
    monkeypatch.setattr(decorators.multiprocessing, "parent_process", lambda: parent)
    decorate()
    assert calls == expected
    decorate()
    assert calls == expected
