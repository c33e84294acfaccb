"""What a trace read is described, looked up again and compared; what cannot be looked up is not kept."""

from __future__ import annotations

import abc
import keyword
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from tests.unit.trace.capture import stitched
from tests.unit.trace.models import stack
from vllm_compile_ext.key import seen as seen_module
from vllm_compile_ext.key.seen import NotDescribed, Seen, changes, collect
from vllm_compile_ext.trace.values import ORDER, Accessed, look

NUMBER = 2.0


VARIABLE, UNREAD = "VARIABLE_OF_A_TEST", "UNREAD_VARIABLE_OF_A_TEST"
MODULE: Any = types.ModuleType("module_of_a_test")
exec("K = 2.0\ndef helper(x, k=3.0):\n    return x * K * k\n", vars(MODULE))


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)
    monkeypatch.delenv(VARIABLE, raising=False)


def read(model: nn.Module) -> Seen:
    traced = stitched(model, (torch.randn(5, 8),))
    seen = collect(model, traced.tracer, traced.graph)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(seen), type=Seen)


class Base:
    pass


class Child(Base):
    pass


class Abstract(abc.ABC):  # noqa: B024 - classes are registered with it
    pass


def uses_global(self: Any, x: Any) -> Any:
    return self.lin(x) * NUMBER


def reads_variable(self: Any, x: Any) -> Any:
    return self.lin(x) * float(os.environ.get(VARIABLE, "1"))


def lists_classes(self: Any, x: Any) -> Any:
    return self.lin(x) * len(Base.__subclasses__())


def asks_for_abstract(self: Any, x: Any) -> Any:
    return self.lin(x) * (2.0 if isinstance(self.some, Abstract) else 3.0)


def patched(self: Any, x: Any) -> Any:
    return self.lin(x)


def scaled(self: Any, x: Any) -> Any:
    return self.lin(x) * self.scale


def calls_helper(self: Any, x: Any) -> Any:
    return self.helper(self.lin(x))


KEPT: list[Any] = []
# What layers do, what is changed after the trace, and what is said of it.
CHANGES: dict[str, tuple[Any, Callable[[Any, pytest.MonkeyPatch], object], str | None]] = {
    "nothing": (scaled, lambda model, patch: None, None),
    "a copied layer's attribute": (
        *(scaled, lambda model, patch: setattr(model.layers[3], "scale", 2.0)),
        "layers.3.scale: 1.0 -> 2.0",
    ),
    "a global": (
        *(uses_global, lambda model, patch: patch.setitem(globals(), "NUMBER", -2.0)),
        f"{__name__}.NUMBER: 2.0 -> -2.0",
    ),
    "a global of another module": (
        *(calls_helper, lambda model, patch: patch.setattr(MODULE, "K", 3.0)),
        "module_of_a_test.K: 2.0 -> 3.0",
    ),
    "a default": (
        *(calls_helper, lambda model, patch: patch.setattr(MODULE.helper, "__defaults__", (4.0,))),
        "helper.__defaults__[0]: 3.0 -> 4.0",
    ),
    "a function that another plugin replaced": (
        *(scaled, lambda model, patch: setattr(type(model.layers[0]), "forward", patched)),
        "forward is another function (replaced by tests.unit.key.test_seen.patched)",
    ),
    "a variable": (
        *(reads_variable, lambda model, patch: patch.setenv(VARIABLE, "2")),
        f"os.environ['{VARIABLE}']: None -> ***",
    ),
    "a variable that was not asked for": (reads_variable, lambda model, patch: patch.setenv(UNREAD, "2"), None),
    "which classes there are": (
        *(lists_classes, lambda model, patch: KEPT.append(type("Late", (Base,), {}))),
        "Base.__subclasses__()",
    ),
    "a class that was registered with an ABC": (
        *(asks_for_abstract, lambda model, patch: Abstract.register(Child)),
        ": False -> True",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, change, said = CHANGES[name]
    child = Child()
    model = stack(forward, scale=lambda i: 1.0, helper=lambda i: MODULE.helper, some=lambda i: child)
    seen = read(model)
    assert changes(seen, model) == []
    change(model, monkeypatch)
    found = [str(each) for each in changes(seen, model)]
    assert (found == []) if said is None else any(said in line for line in found), found


def test_weights_and_unread_attributes_are_not_read() -> None:
    model = stack()
    seen = read(model)
    other = stack(unread=lambda i: i)
    nn.init.ones_(other.layers[3].lin.weight)
    # Each stack makes a class of its own.
    for layer in other.layers:
        layer.__class__ = type(model.layers[0])
    other.__class__ = type(model)
    assert changes(seen, other) == []


def shares_memory(self: Any, x: Any) -> Any:
    return self.lin(x) * self.some.handle if dict(group_name=1) else x


def reads_the_name(self: Any, x: Any) -> Any:
    return self.lin(x) * len(self.some.group_name)


@pytest.mark.parametrize(("forward", "same"), [(shares_memory, True), (reads_the_name, False)])
def test_the_name_of_memory_that_ranks_share_counts_only_where_it_is_read(
    forward: Any, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU ranks name it by a port, which is another one in each start."""
    place, name = seen_module._NAME_OF_RUN[0].rsplit(".", 1)
    kind = type(name, (), {"__module__": place})

    def memory(port: int) -> Any:
        made = kind()
        made.group_name, made.handle = f"{port}-tp:0", 3
        return made

    one = memory(4711)
    seen = read(stack(forward, some=lambda i: one))
    other = memory(4712)
    assert (changes(seen, stack(forward, some=lambda i: other)) == []) is same
    other.handle = 4
    assert changes(seen, stack(forward, some=lambda i: other)) != []


NAMES = {"gate", "up", "down", "q_proj", "k_proj", "v_proj"}


def orders() -> list[set[str]]:
    """Equal sets that are iterated over in different orders: words that collide can come in the order of insertion."""
    other = next(word for word in map(str, range(10_000)) if [*{"gate", word}] != [*{word, "gate"}])
    return [{"gate", other}, {other, "gate"}]


def is_named(self: Any, x: Any) -> Any:
    return self.lin(x) if "gate" in self.some and len(self.some) == 6 else x


def named_in_order(self: Any, x: Any) -> Any:
    for name in self.some:
        x = self.lin(x) * len(name)
    return x


@pytest.mark.parametrize(("forward", "ordered"), [(is_named, False), (named_in_order, True)])
def test_strings_of_a_set_are_in_order_only_where_code_iterates(forward: Any, ordered: bool) -> None:
    model = stack(forward, some=lambda i: NAMES)
    seen = read(model)
    accessed = Accessed()
    accessed.said |= {word for word in seen.said if word == ORDER}
    # One set in two orders, as strings have them in two processes.
    texts = {repr(look(one, accessed)) for one in orders()}
    assert (len(texts) > 1) is ordered
    assert changes(seen, model) == []


def test_enums_of_cpp_and_tables_of_words_can_be_looked_up_in_another_process() -> None:
    accessed = Accessed()
    sums, products = (look(op, accessed) for op in (torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.PRODUCT))
    assert sums is not None
    assert sums != products
    described = look(keyword.iskeyword, accessed)
    assert described is not None
    assert described.parts == [(".__self__", sorted(keyword.kwlist))]


def test_code_of_no_module_is_not_kept() -> None:
    space: dict[str, Any] = {}
    exec("K = 2.0\ndef forward(self, x):\n    return self.lin(x) * K\n", space)
    with pytest.raises(NotDescribed, match="the global K of code that is in no module"):
        read(stack(space["forward"]))


def test_a_value_of_an_unknown_type_is_not_kept() -> None:
    model = stack(lambda s, x: s.lin(x) * len(s.view), view=lambda i: b"ab")
    model.layers[0].view = model.layers[1].view = memoryview(b"ab")
    with pytest.raises((NotDescribed, torch._dynamo.exc.TorchDynamoException), match="memoryview"):
        read(model)


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("library_of_a_test", "FRAGMENT") as made:
        yield made


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def calls_operator(self: Any, x: Any) -> Any:
    return torch.ops.library_of_a_test.op(self.lin(x))


def test_an_operator_with_another_schema() -> None:
    def define(schema: str) -> torch.library.Library:
        library = torch.library.Library("library_of_a_test", "FRAGMENT")
        library.define(f"op{schema}")
        library.impl("op", as_it_is, "CPU")
        library._register_fake("op", as_it_is)
        return library

    library = define("(Tensor x) -> Tensor")
    model = stack(calls_operator)
    seen = read(model)
    assert changes(seen, model) == []
    library._destroy()
    library = define("(Tensor x, int n=1) -> Tensor")
    found = [str(c) for c in changes(seen, model)]
    assert any("int n=1" in c for c in found), found
    library._destroy()


@pytest.mark.parametrize("key", ["Meta", "CompositeExplicitAutograd"])
def test_an_operator_that_unknown_code_traces_is_not_kept(library: torch.library.Library, key: str) -> None:
    library.define("op(Tensor x) -> Tensor")
    library.impl("op", as_it_is, key)
    with pytest.raises(NotDescribed, match="what the operator library_of_a_test::op is made of"):
        read(stack(calls_operator))
