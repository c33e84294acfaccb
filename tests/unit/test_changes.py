from pathlib import Path

import pytest

from vllm_compile_ext import monkeypatches


def test_the_docs_page_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "changes.md"
    assert page.read_text() == monkeypatches.markdown(), (
        "run: python -m vllm_compile_ext.monkeypatches > docs/changes.md"
    )


def test_a_failure_undoes_what_was_done_before_it() -> None:
    done: list[str] = []

    def good() -> monkeypatches.Undo:
        done.append("made")
        return lambda: done.append("undone")

    def bad() -> monkeypatches.Undo:
        raise RuntimeError("surprise")

    changes = (monkeypatches.Change("a", "", good), monkeypatches.Change("b", "", bad))
    with pytest.raises(RuntimeError, match="surprise"):
        monkeypatches.make(changes)
    assert done == ["made", "undone"]
