"""Imports are timed, hooks get their modules once they are imported, and imports are otherwise as they ever were."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_compile_ext.finder import Finder

MODULES = {
    "torch": "import time; time.sleep(0.02); import inner; import numpy",
    "numpy": "import time; time.sleep(0.01)",
    "inner": "value = 'stock'\ndef function():\n    return value\n",
    "bad": "raise ValueError('no')",
    "broken": "import numpy_is_not_here",
}


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Finder]:
    """A finder of its own, first on the path, and modules to import, of which two have the names of heavy ones."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Finder()
    monkeypatch.setattr(sys, "meta_path", [made, *sys.meta_path])
    yield made
    for name in MODULES:
        sys.modules.pop(name, None)


def test_heavy_and_outermost_imports_are_timed(ours: Finder) -> None:
    ours.timing = True
    importlib.import_module("torch")
    importlib.import_module("inner")
    found = [(i.name, i.around and i.around.name) for i in ours.intervals]
    assert found == [("numpy", "torch"), ("torch", None)]
    assert ours.intervals[1].end - ours.intervals[1].start > ours.intervals[0].end - ours.intervals[0].start > 0


def test_a_sink_gets_each_import_and_its_owner(ours: Finder) -> None:
    got: list[Any] = []
    ours.timing, ours.sink, ours.owner = True, got.append, lambda: "owner"
    importlib.import_module("torch")
    assert [(i.name, i.owner) for i in got] == [("numpy", None), ("torch", "owner")]
    assert ours.intervals == []


def test_a_sink_that_fails_is_no_matter(ours: Finder) -> None:
    def sink(interval: Any) -> None:
        raise RuntimeError("surprise")

    ours.timing, ours.sink = True, sink
    importlib.import_module("inner")


def test_nothing_is_timed_when_the_start_is_over(ours: Finder) -> None:
    ours.timing = True
    importlib.import_module("inner")
    ours.stop_timing()
    importlib.import_module("torch")
    assert ours.intervals == []


@pytest.mark.parametrize("timing", [False, True])
def test_modules_look_as_ever(ours: Finder, timing: bool) -> None:
    ours.timing = timing
    ours.after("inner", lambda module: None)
    inner = importlib.import_module("inner")
    spec = inner.__spec__
    assert spec is not None
    assert type(inner.__loader__) is SourceFileLoader
    assert spec.loader is inner.__loader__
    assert list(vars(spec.loader)) == ["name", "path"]
    assert inspect.getsource(inner.function) == "def function():\n    return value\n"
    assert importlib.reload(inner) is inner


@pytest.mark.parametrize("timing", [False, True])
def test_errors_come_through(ours: Finder, timing: bool) -> None:
    ours.timing = timing
    met: list[ModuleType] = []
    for name, error in (("bad", ValueError), ("broken", ModuleNotFoundError), ("nowhere", ModuleNotFoundError)):
        ours.after(name, met.append)
        for _ in range(2):
            with pytest.raises(error):
                importlib.import_module(name)
        assert name not in sys.modules
    assert met == []


def test_hooks_are_called_once_in_order_and_one_that_fails_is_no_matter(ours: Finder) -> None:
    met: list[str] = []

    def bad(module: ModuleType) -> None:
        raise RuntimeError("surprise")

    ours.after("inner", bad)
    ours.after("inner", lambda module: met.append(module.__name__))
    inner = importlib.import_module("inner")
    ours.after("inner", lambda module: met.append("now"))
    importlib.reload(inner)
    assert met == ["inner", "now"]


def test_a_hook_of_a_module_that_is_there_raises(ours: Finder) -> None:
    def bad(module: ModuleType) -> None:
        raise RuntimeError("surprise")

    importlib.import_module("inner")
    with pytest.raises(RuntimeError, match="surprise"):
        ours.after("inner", bad)


def test_a_hook_sees_the_module_before_whoever_imports_it(ours: Finder, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("from inner import value")
    ours.after("inner", lambda module: setattr(module, "value", "ours"))
    assert importlib.import_module("bad").value == "ours"


def test_what_waits_can_be_taken_back(ours: Finder) -> None:
    met: list[ModuleType] = []
    undo = ours.after("inner", met.append)
    undo()
    undo()
    importlib.import_module("inner")
    assert (met, ours.hooks) == ([], {})


def test_a_module_that_is_only_looked_for_is_hooked_when_it_is_imported(ours: Finder) -> None:
    met: list[ModuleType] = []
    ours.after("inner", met.append)
    assert importlib.util.find_spec("inner") is not None
    assert met == []
    assert met == [] or importlib.import_module("inner")
    assert [m.__name__ for m in [importlib.import_module("inner"), *met]] == ["inner", "inner"]


def test_a_module_that_a_loader_of_others_runs_is_hooked_too(ours: Finder) -> None:
    """As tracing libraries do, whose loaders are shared or stand around Python's."""

    class Theirs:
        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            module.value = "theirs"  # type: ignore[attr-defined]

    loader: Any = Theirs()

    class Finds:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return ModuleSpec(name, loader) if name in ("inner", "bad") else None

    sys.meta_path.insert(1, Finds())  # type: ignore[arg-type]
    ours.after("inner", lambda module: setattr(module, "value", f"ours, not {module.value}"))
    inner = importlib.import_module("inner")
    assert (inner.value, importlib.import_module("bad").value) == ("ours, not theirs", "theirs")
    assert inner.__spec__ is not None
    assert inner.__spec__.loader is inner.__loader__ is loader


def test_what_another_finder_imports_while_it_looks_is_served(ours: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(ours, "_serve", lambda name, tail: served.append(name))
    ours.swapped = ours.timing = True

    class Looks:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "inner":
                ours.find_spec("vllm_compile_ext.upstream.backends")

    sys.meta_path.insert(1, Looks())  # type: ignore[arg-type]
    importlib.import_module("inner")
    assert served == ["vllm_compile_ext.upstream.backends"]
