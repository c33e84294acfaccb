"""Stacks of layers that set traps for a tracer which takes layers to be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._library.opaque_object as opaque
from torch import nn
from torch._opaque_base import OpaqueBase


class Name(OpaqueBase):
    """A layer's name that Dynamo lifts to a graph input, as vLLM's LayerName."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Name) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        return f"Name({self.value!r})", {"Name": Name}


opaque.register_opaque_type(Name, typ="value", hoist=True)


@torch.library.custom_op("t::attn", mutates_args=())
def attn(x: torch.Tensor, name: Name) -> torch.Tensor:
    return x.clone()


@attn.register_fake
def _(x: torch.Tensor, name: Name) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("t::attn_str", mutates_args=())
def attn_str(x: torch.Tensor, name: str) -> torch.Tensor:
    return x.clone()


@attn_str.register_fake
def _(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("t::attn_out", mutates_args=("out",))
def attn_out(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


@attn_out.register_fake
def _(x: torch.Tensor, out: torch.Tensor) -> None:
    return None


class Layer(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.idx = i
        self.name = f"layers.{i}"

    def forward(self, x: torch.Tensor) -> Any:
        return self.lin(x).relu()


def stack(forward: Callable[..., Any] = Layer.forward, **attributes: Any) -> Any:
    """Six layers with `forward`.  `attributes`: name -> function of the layer's number."""

    class Kind(Layer):
        pass

    Kind.forward = forward  # type: ignore[method-assign]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Kind(i) for i in range(6)])
            for i, layer in enumerate(self.layers):
                for key, value in attributes.items():
                    setattr(layer, key, value(i))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    return Model().requires_grad_(False)


def named() -> nn.Module:
    """Layers whose names go into an op."""
    return stack(lambda s, x: torch.ops.t.attn(s.lin(x), Name(s.name)))


def views() -> nn.Module:
    """Layers that make views in one piece and use them in another."""
    return stack(lambda s, x: (lambda y: y + torch.sigmoid(y.view(-1)).view(-1, 8))(s.lin(x)))


def written() -> nn.Module:
    """Layers with a buffer that is allocated in one piece and written in another."""
    return stack(lambda s, x: (lambda y, o: (torch.ops.t.attn_out(y, o), o + y)[1])(s.lin(x), torch.empty_like(x)))
