from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_compile_ext.after_import import after_import

NAME = "imported_late_for_a_test"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / f"{NAME}.py").write_text("def value():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield
    sys.modules.pop(NAME, None)
    sys.meta_path[:] = before


def change(module: ModuleType) -> None:
    module.value = lambda: 2  # type: ignore[attr-defined]


def test_now_or_later() -> None:
    finders = list(sys.meta_path)
    after_import(NAME, change)
    assert NAME not in sys.modules
    late = importlib.import_module(NAME)
    assert late.value() == 2
    assert sys.meta_path == finders, "it waits no longer"
    assert "return 1" in inspect.getsource(late)
    after_import(NAME, lambda module: setattr(module, "value", lambda: 3))
    assert late.value() == 3


def test_taken_back() -> None:
    after_import(NAME, change)()
    assert importlib.import_module(NAME).value() == 1


def test_a_failure_is_a_line_and_the_import_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(module: ModuleType) -> None:
        raise ZeroDivisionError("surprise")

    after_import(NAME, fail)
    assert importlib.import_module(NAME).value() == 1
    assert "stays as vLLM has it: ZeroDivisionError in " in caplog.text


def test_it_is_done_once_where_another_finder_asks_all_of_them() -> None:
    class Asking:
        """Finds nothing itself, as the one that times imports."""

        busy = False

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if self.busy:
                return None
            self.busy = True
            try:
                others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
                return next((spec for spec in others if spec is not None), None)
            finally:
                self.busy = False

    calls: list[str] = []
    for place in (0, 1):
        sys.meta_path.insert(0, Asking())
        after_import(NAME, lambda module: calls.append(module.__name__))
        sys.meta_path.insert(place, Asking())
        importlib.import_module(NAME)
        assert calls == [NAME]
        calls.clear()
        del sys.modules[NAME]
