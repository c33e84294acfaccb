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


@pytest.mark.parametrize(
    ("owner", "name", "answer"), [(Base, "method", "stock"), (Base, "of_class", "Base"), (Base, "static", "stock")]
)
def test_functions_are_wrapped_as_what_they_are(owner: Any, name: str, answer: str) -> None:
    before = vars(owner)[name]
    undo = replace(owner, name, ours)
    assert getattr(owner(), name)() == f"ours, not {answer}"
    assert type(vars(owner)[name]) is type(before)
    assert getattr(owner, name).__doc__ == getattr(before, "__func__", before).__doc__
    undo()
    assert vars(owner)[name] is before


def test_an_instance_and_a_subclass_get_an_attribute_of_their_own_for_as_long() -> None:
    one, other = Base(), Base()
    for owner, call in ((one, one.method), (Child, lambda: Child.of_class())):
        undo = replace(owner, call.__name__ if owner is one else "of_class", ours)
        assert "ours" in (one.method() if owner is one else Child.of_class())
        undo()
    assert (one.method(), other.method(), Child.of_class()) == ("stock", "stock", "Child")
    assert (vars(one), "of_class" in vars(Child)) == ({}, False)


def test_items_and_values_that_are_no_functions() -> None:
    table = {"is": 1}
    undo = replace(table, "is", lambda stock: stock + 1)
    assert table == {"is": 2}
    undo()
    assert table == {"is": 1}
    undo = replace(Base, "value", lambda stock: "ours")
    assert Base.value == "ours"
    undo()
    assert Base.value == "stock"


def test_what_is_not_changed_and_what_others_changed_since_stays() -> None:
    replace(Base, "value", lambda stock: stock)()
    undo = replace(Base, "value", lambda stock: "ours")
    Base.value = "theirs"
    undo()
    assert Base.value == "theirs"
    Base.value = "stock"


def test_what_is_not_there_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        replace(Base, "nothing", ours)
    with pytest.raises(KeyError, match="nothing"):
        replace({}, "nothing", ours)
