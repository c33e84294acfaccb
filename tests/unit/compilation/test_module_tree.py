"""The digest of a module tree: everything that tracing can see of a model, and nothing of where or how it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vllm_compile_ext.compilation.module_tree import structure


class Method:
    def __init__(self) -> None:
        self.block = 16
        self.path = "/somewhere/else"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(2, 3), persistent=False)
        self.quant_method = Method()
        self.eps = 1e-6
        self.layer_name = "model.layers.0"
        self.sizes = [4, 4]
        self.tp_rank = 0
        self.forward_native = self.one

    def one(self) -> None: ...

    def two(self) -> None: ...


def model(depth: int = 2) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(depth)))


class Packed(nn.Parameter):
    pass


def _replace_tensor(m: Any, name: str, value: torch.Tensor) -> None:
    setattr(m[1], name, value)


CHANGES: dict[str, Callable[[Any], object]] = {
    "shape": lambda m: setattr(m[1].linear, "weight", nn.Parameter(torch.zeros(4, 5))),
    "dtype": lambda m: m[1].to(torch.bfloat16),
    "stride": lambda m: _replace_tensor(m, "scale", torch.ones(3, 2).t()),
    "class of a parameter": lambda m: setattr(m[1].linear, "weight", Packed(torch.ones(4, 4))),
    "one tensor in two places": lambda m: setattr(m[1].linear, "weight", m[0].linear.weight),
    "no bias": lambda m: m[1].linear.register_parameter("bias", None),
    "an attribute": lambda m: setattr(m[1], "eps", 1e-5),
    "a list": lambda m: m[1].sizes.append(8),
    "a name": lambda m: setattr(m[1], "layer_name", "draft.layers.0"),
    "a function": lambda m: setattr(m[1], "forward_native", m[1].two),
    "training": lambda m: m[1].train(not m[1].training),
    "a method of calculating": lambda m: setattr(m[1], "quant_method", object()),
    "an attribute of one": lambda m: setattr(m[1].quant_method, "block", 32),
    "a plain tensor": lambda m: _replace_tensor(m, "extra", torch.ones(1)),
    "a module": lambda m: m[1].add_module("more", nn.Identity()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_tracing_can_see_counts(name: str) -> None:
    changed = model()
    CHANGES[name](changed)
    assert structure(changed) != structure(model())


def test_what_differs_from_start_to_start_does_not_count() -> None:
    other = model()
    with torch.no_grad():
        other[0].linear.weight.fill_(3)
    other[0].tp_rank = 1
    other[0].quant_method.path = "/another/place"
    other.compiled = True
    other.aot_compiled_fn = print
    assert structure(other) == structure(model())


def test_depth_is_in_words() -> None:
    assert structure(model(3)).startswith("7 modules, 9 tensors, ")
    assert structure(model(3)) != structure(model(2))
