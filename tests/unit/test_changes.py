"""The table of changes: rows are made now or when their module is imported, and undone in reverse."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_compile_ext import changes, finder
from vllm_compile_ext.changes import Change

done: list[str] = []
Rows = Callable[..., None]


# What rows name.


def ours(stock: str, more: str = "") -> str:
    return f"ours, not {stock}{more}"


def failing(stock: str) -> str:
    raise AttributeError("surprise")


def of_the_process(name: str) -> changes.Undo:
    done.append(f"made {name}")
    return lambda: done.append(f"undone {name}")


def process_fails() -> None:
    raise RuntimeError("surprise")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rows]:
    """Sets the table, for a package of two modules, of which the second takes a name of the first."""
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "__init__.py").write_text("")
    (tmp_path / "changed" / "one.py").write_text("value = 'stock'\nclass A:\n    value = 'stock'\n")
    (tmp_path / "changed" / "two.py").write_text("from changed.one import value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Change, "function", lambda row: globals()[row.by])
    done.clear()

    def put(*table: tuple[str, str, str] | tuple[str, str, str, str]) -> None:
        made = [Change("now", module, attribute, by, "", given) for module, attribute, by, *given in table]
        monkeypatch.setattr(changes, "TABLE", made)

    yield put
    finder.remove()
    for name in [name for name in sys.modules if name.partition(".")[0] == "changed"]:
        del sys.modules[name]


def test_the_docs_page_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "changes.md"
    assert page.read_text() == changes.markdown(), "run: python -m vllm_compile_ext.changes > docs/changes.md"


def test_a_row_is_made_when_its_module_is_imported_and_undone(rows: Rows) -> None:
    rows(("changed.one", "value", "ours"), ("changed.one", "A.value", "ours", "!"))
    undos = changes.make("now")
    assert "changed.one" not in sys.modules
    assert importlib.import_module("changed.two").value == "ours, not stock"
    one = sys.modules["changed.one"]
    assert one.A.value == "ours, not stock!"
    changes.undo(undos)
    assert (one.value, one.A.value, undos) == ("stock", "stock", [])


def test_a_row_is_made_at_once_where_the_module_is_imported_already(rows: Rows) -> None:
    one = importlib.import_module("changed.one")
    rows(("changed.one", "value", "ours"), ("changed.one", "value", "ours"))
    undos = changes.make("now")
    assert one.value == "ours, not ours, not stock"
    changes.undo(undos)
    assert one.value == "stock"


def test_after_the_undo_an_import_changes_nothing(rows: Rows) -> None:
    rows(("changed.one", "value", "ours"))
    changes.undo(changes.make("now"))
    assert importlib.import_module("changed.one").value == "stock"


def test_other_kinds_of_rows_are_not_made(rows: Rows) -> None:
    rows(("", "", "of_the_process", "a"))
    assert changes.make("then") == done == []


@pytest.mark.parametrize(
    "bad", [("", "", "process_fails"), ("changed.one", "value", "failing"), ("changed.one", "no", "ours")]
)
def test_a_failure_undoes_the_rows_before_it(rows: Rows, bad: tuple[str, str, str]) -> None:
    one = importlib.import_module("changed.one")
    rows(("", "", "of_the_process", "a"), ("changed.one", "value", "ours"), ("", "", "of_the_process", "b"), bad)
    with pytest.raises((RuntimeError, AttributeError)):
        changes.make("now")
    assert done == ["made a", "made b", "undone b", "undone a"]
    assert one.value == "stock"


def test_a_late_failure_costs_a_line_and_leaves_the_module(rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    rows(("changed.one", "value", "failing"), ("changed.one", "A.value", "ours"))
    undos = changes.make("now")
    one = importlib.import_module("changed.one")
    assert (one.value, one.A.value) == ("stock", "ours, not stock")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("changed.one.value stays as it is: AttributeError")
    changes.undo(undos)
    assert one.A.value == "stock"
