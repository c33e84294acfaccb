"""One attribute is replaced and put back, whatever kind it is of."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_compile_ext.replace import replace


class Base:
    value = "stock"

    def method(self) -> str:
        """Says."""
        return "stock"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @staticmethod
    def static() -> str:
        return "stock"


class Child(Base):
    pass


def ours(stock: Any) -> Any:
    return lambda *args: f"ours, not {stock(*args)}"


one = Base()


@pytest.mark.parametrize(
    ("owner", "name", "caller", "answer"),
    [
        (Base, "method", Base(), "stock"),
        (Base, "of_class", Base(), "Base"),
        (Base, "static", Base(), "stock"),
        (Child, "of_class", Child, "Child"),  # which it inherits
        (one, "method", one, "stock"),
    ],
)
def test_functions_are_wrapped_as_what_they_are(owner: Any, name: str, caller: Any, answer: str) -> None:
    before, stock = dict(vars(owner)), getattr(owner, name)
    undo = replace(owner, name, ours)
    found = getattr(caller, name)
    assert (found(), found.__doc__) == (f"ours, not {answer}", stock.__doc__)
    if name in before:
        assert type(vars(owner)[name]) is type(before[name])
    undo()
    assert dict(vars(owner)) == before


def test_items_and_values_that_are_no_functions() -> None:
    table = {"is": 1}
    undo = replace(table, "is", lambda stock: stock + 1)
    assert table == {"is": 2}
    undo()
    assert table == {"is": 1}


def test_what_is_not_changed_and_what_others_changed_since_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "value", "stock")
    replace(Base, "value", lambda stock: stock)()
    undo = replace(Base, "value", lambda stock: "ours")
    assert Base.value == "ours"
    Base.value = "theirs"
    undo()
    assert Base.value == "theirs"


@pytest.mark.parametrize(("owner", "error"), [(Base, AttributeError), ({}, KeyError)])
def test_what_is_not_there_cannot_be_replaced(owner: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="nothing"):
        replace(owner, "nothing", ours)
