"""What a trace read is described, looked up again and compared; what cannot be looked up is not kept."""

from __future__ import annotations

import abc
import keyword
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from tests.unit.trace.capture import stitched
from tests.unit.trace.models import stack
from vllm_compile_ext.key.seen import NotDescribed, Seen, changes, collect
from vllm_compile_ext.trace.values import ORDER, Accessed, look

NUMBER = 2.0


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    made = types.ModuleType("module_of_a_test")
    exec("import os, torch\nK = 2.0\ndef helper(x, k=3.0):\n    return x * K * k\n", vars(made))
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def read(model: nn.Module) -> Seen:
    traced = stitched(model, (torch.randn(5, 8),))
    seen = collect(model, traced.tracer, traced.graph)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(seen), type=Seen)


def uses_global(self: Any, x: Any) -> Any:
    return self.lin(x) * NUMBER


def test_nothing_has_changed() -> None:
    model = stack(scale=float)
    assert changes(read(model), model) == []


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


def test_a_copied_layers_attribute_is_named_with_both_values() -> None:
    model = stack(lambda s, x: s.lin(x) * s.scale, scale=lambda i: 1.0)
    seen = read(model)
    model.layers[3].scale = 2.0  # it was copied
    (change,) = changes(seen, model)
    assert str(change) == "layers.3.scale: 1.0 -> 2.0"


def test_a_global(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(uses_global)
    seen = read(model)
    monkeypatch.setitem(globals(), "NUMBER", -2.0)
    (change,) = changes(seen, model)
    assert str(change) == f"{__name__}.NUMBER: 2.0 -> -2.0"


def test_a_constant_and_a_default_of_another_module(module: Any) -> None:
    model = stack(lambda s, x: s.helper(s.lin(x)), helper=lambda i: module.helper)
    seen = read(model)
    module.K = 3.0
    assert [str(c) for c in changes(seen, model)] == ["module_of_a_test.K: 2.0 -> 3.0"]
    module.K = 2.0
    assert changes(seen, model) == []
    module.helper.__defaults__ = (4.0,)
    assert any("__defaults__" in c.name for c in changes(seen, model))


def test_a_function_that_another_plugin_replaced() -> None:
    model = stack()
    seen = read(model)

    def patched(self: Any, x: Any) -> Any:
        return self.lin(x)

    type(model.layers[0]).forward = patched
    found = [str(c) for c in changes(seen, model)]
    assert any("forward is another function (replaced by tests.unit.key.test_seen." in c for c in found), found


def reads_variable(self: Any, x: Any) -> Any:
    return self.lin(x) * float(os.environ.get("VARIABLE_OF_A_TEST", "1"))


def test_only_variables_that_were_asked_for_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VARIABLE_OF_A_TEST", raising=False)
    model = stack(reads_variable)
    seen = read(model)
    monkeypatch.setenv("UNREAD_VARIABLE_OF_A_TEST", "1")
    assert changes(seen, model) == []
    monkeypatch.setenv("VARIABLE_OF_A_TEST", "2")
    (change,) = changes(seen, model)
    assert str(change) == "os.environ['VARIABLE_OF_A_TEST']: None -> ***"
    seen = read(model)
    monkeypatch.setenv("VARIABLE_OF_A_TEST", "3")
    (change,) = changes(seen, model)
    assert str(change) == "os.environ['VARIABLE_OF_A_TEST'] has another value"


NAMES = {"gate", "up", "down", "q_proj", "k_proj", "v_proj"}


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
    code = "import sys; from tests.unit.key.test_seen import NAMES, Accessed, look; accessed = Accessed();"
    code += "accessed.said |= set(sys.argv[1:]); print(look(NAMES, accessed).parts)"
    texts = set()
    for seed in "12":
        env = os.environ | {"PYTHONHASHSEED": seed}
        words = [w for w in seen.said if w == ORDER]
        texts.add(subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, check=True).stdout)
    assert (len(texts) > 1) is ordered
    assert changes(seen, model) == []


class Base:
    pass


class Child(Base):
    pass


class Abstract(abc.ABC):  # noqa: B024 - classes are registered with it
    pass


def lists_classes(self: Any, x: Any) -> Any:
    return self.lin(x) * len(Base.__subclasses__())


def test_which_classes_there_are() -> None:
    model = stack(lists_classes)
    seen = read(model)
    assert changes(seen, model) == []
    late = type("Late", (Base,), {})
    found = [str(c) for c in changes(seen, model)]
    assert any("Base.__subclasses__()" in c for c in found), found
    del late


def asks_for_abstract(self: Any, x: Any) -> Any:
    return self.lin(x) * (2.0 if isinstance(self.some, Abstract) else 3.0)


def test_a_class_that_was_registered_with_an_abc() -> None:
    some = Child()
    model = stack(asks_for_abstract, some=lambda i: some)
    seen = read(model)
    assert changes(seen, model) == []
    Abstract.register(Child)
    assert [(c.old, c.new) for c in changes(seen, model)] == [("False", "True")]


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
