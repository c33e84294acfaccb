"""Changes that are made to a module when it is imported."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from vllm_compile_ext import after_import

Undo = Callable[[], None]


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with two modules, of which the second takes a name of the first."""
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("value = 'stock'\ndef function():\n    return value\n")
    (folder / "two.py").write_text("from changed.one import value\n")
    (folder / "broken.py").write_text("value = 'stock'\nraise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield folder
    assert sys.meta_path == before
    for name in [name for name in sys.modules if name.partition(".")[0] == "changed"]:
        del sys.modules[name]


def setting(module: ModuleType) -> Undo:
    """The change: `value` becomes another one."""
    stock = module.value
    module.value = "ours"  # type: ignore[attr-defined]

    def undo() -> None:
        module.value = stock  # type: ignore[attr-defined]

    return undo


@pytest.fixture
def undo() -> Iterator[Undo]:
    yield (made := after_import.install({"changed.one": setting}))
    made()


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_a_change_is_made_when_the_module_is_imported_and_undone() -> None:
    undo = after_import.install({"changed.one": setting})
    assert "changed.one" not in sys.modules
    one = load("changed.one")
    assert one.value == one.function() == "ours"
    undo()
    assert one.value == "stock"


def test_modules_that_import_it_see_the_change(undo: Undo) -> None:
    assert load("changed.two").value == "ours"


def test_a_change_is_made_at_once_where_the_module_is_imported_already() -> None:
    one = load("changed.one")
    undo = after_import.install({"changed.one": setting})
    assert one.value == "ours"
    undo()
    assert one.value == "stock"


def test_after_the_undo_an_import_changes_nothing() -> None:
    after_import.install({"changed.one": setting})()
    assert load("changed.one").value == "stock"


def test_changes_are_undone_in_reverse_order() -> None:
    done: list[str] = []

    def noting(module: ModuleType) -> Undo:
        return lambda: done.append(module.__name__)

    undo = after_import.install({"changed.one": noting, "changed.two": noting})
    load("changed.two")
    undo()
    assert sorted(done) == ["changed.one", "changed.two"]
    assert done == ["changed.two", "changed.one"]


def test_loader_spec_and_source_are_those_of_the_module(undo: Undo) -> None:
    one = load("changed.one")
    assert one.__spec__ is not None
    assert type(one.__loader__) is SourceFileLoader
    assert one.__spec__.loader is one.__loader__
    assert one.__spec__.name == one.__loader__.name == "changed.one"
    assert one.__spec__.origin == one.__file__
    assert inspect.getsource(one.function) == "def function():\n    return value\n"


def test_other_modules_are_found_as_ever(undo: Undo) -> None:
    two = load("changed.two")
    assert two.__spec__ is not None
    assert type(two.__spec__.loader) is SourceFileLoader


def test_a_module_that_is_only_looked_for_is_not_changed_and_can_be_imported_later(undo: Undo) -> None:
    spec = importlib.util.find_spec("changed.one")
    assert spec is not None
    assert spec.origin is not None
    assert "changed.one" not in sys.modules
    assert load("changed.one").value == "ours"


def test_a_module_that_is_not_there_is_missing_as_ever() -> None:
    undo = after_import.install({"changed.none": setting})
    with pytest.raises(ModuleNotFoundError, match=r"changed\.none"):
        load("changed.none")
    assert importlib.util.find_spec("changed.none") is None
    undo()


def test_a_module_that_fails_fails_as_ever_and_is_not_changed() -> None:
    undo = after_import.install({"changed.broken": setting})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            load("changed.broken")
        assert "changed.broken" not in sys.modules
    undo()


def test_a_change_that_fails_costs_one_line_and_leaves_the_module(caplog: pytest.LogCaptureFixture) -> None:
    def failing(module: ModuleType) -> Undo:
        raise AttributeError("module has no attribute 'ModelCudaGraphManager'")

    undo = after_import.install({"changed.one": failing, "changed.two": setting})
    two = load("changed.two")
    assert (load("changed.one").value, two.value) == ("stock", "ours")
    (line,) = [r.getMessage() for r in caplog.records]
    assert "changed.one" in line
    assert "AttributeError in test_a_change_that_fails" in line
    undo()
    assert two.value == "stock"


def test_a_change_that_fails_is_a_line_and_the_others_stand(caplog: pytest.LogCaptureFixture) -> None:
    one, two = load("changed.one"), load("changed.two")

    def failing(module: ModuleType) -> Undo:
        raise AttributeError("surprise")

    undo = after_import.install({"changed.one": setting, "changed.two": failing})
    assert (one.value, two.value) == ("ours", "stock")
    assert "changed.two stays as vLLM has it: AttributeError in test_a_change_that_fails" in caplog.text
    undo()
    assert one.value == "stock"


def test_two_that_change_the_same_module_both_do() -> None:
    def adding(module: ModuleType) -> Undo:
        stock = module.value
        module.value = stock + "+"  # type: ignore[attr-defined]

        def undo() -> None:
            module.value = stock  # type: ignore[attr-defined]

        return undo

    first = after_import.install({"changed.one": setting})
    second = after_import.install({"changed.one": adding})
    one = load("changed.one")
    assert one.value == "ours+"
    second()
    first()
    assert one.value == "stock"
