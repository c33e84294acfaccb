"""Layers that were once copied though they differ, each by hand: found by review, kept for ever."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.fuzz import kit
from tests.fuzz.stacks import Feature, Stack
from tests.fuzz.values import extra_module


def case(what: str, state: Callable[[int], dict[str, Any]], *lines: str, after: Any = None, **feature: Any) -> Stack:
    """`state(i)`: attributes of layer i; a module becomes a submodule.  `after(model, space)` prepares more."""

    def prepare(model: Any, space: dict[str, Any]) -> None:
        for i, layer in enumerate(model.layers):
            for name, item in state(i).items():
                setattr(layer, name, item)
        if after is not None:
            after(model, space)

    return Stack(what, [Feature(what, prepare, lines=lines, **feature)])


def nothing(i: int) -> dict[str, Any]:
    return {}


def tables(key: Callable[[Any], Any]) -> Callable[[Any, dict[str, Any]], None]:
    """Fill the global `TABLE` with a number for each layer."""
    return lambda model, space: space["TABLE"].update({key(m): float(i) for i, m in enumerate(model.layers)})


def parts(part: Callable[[Any], Any], *which: int) -> Callable[[Any, dict[str, Any]], None]:
    """Fill the global `PARTS` with parts of some layers."""
    return lambda model, space: space["PARTS"].extend(part(model.layers[i]) for i in which)


def square(model: Any, space: dict[str, Any]) -> None:
    model.square = torch.arange(64.0).div(64).reshape(8, 8)


def views(model: Any, space: dict[str, Any]) -> None:
    """For some layers, `view` is of the layer's other buffer."""
    for i, layer in enumerate(model.layers):
        layer.register_buffer("cache", torch.full((8, 8), 1.0 + i))
        layer.register_buffer("other", torch.full((8, 8), 2.0))
        layer.view = (layer.cache if i in (2, 4) else layer.other).view(64)


def own_views(model: Any, space: dict[str, Any]) -> None:
    """For some layers, `view` is of a buffer that the layer reads too."""
    views(model, space)
    for i, layer in enumerate(model.layers):
        if i not in (2, 4):
            layer.view = torch.full((64,), 2.0)


def neighbours(model: Any, space: dict[str, Any]) -> None:
    """For some layers, `view` is of the previous layer's buffer."""
    views(model, space)
    for i, layer in enumerate(model.layers):
        layer.view = (model.layers[i - 1] if i in (3, 5) else layer).cache.view(64)


def mixed(model: Any, space: dict[str, Any]) -> None:
    """The third layer's buffers are one."""
    for i, layer in enumerate(model.layers):
        layer.register_buffer("one", torch.full((8,), 1.0 + i))
        layer.register_buffer("two", layer.one if i == 2 else torch.full((8,), 1.0))


READ_BEFORE = {"before": ["x = x + 1 if layer.cfg['k'] > 2 else x"]}

CASES: dict[str, Stack] = {
    stack.what: stack
    for stack in (
        case(
            "nested containers",
            lambda i: {"options": {"scaling": [{"factor": (0, 2.0 if i >= 3 else 0.0)}]}},
            "y = y * 1.5 if s.options['scaling'][0]['factor'][1] > 1 else y",
        ),
        case("default of a function", lambda i: {"f": lambda y, k=float(i): y * k}, "y = s.f(y)"),
        case("field of a named tuple", lambda i: {"cfg": kit.Scale(float(i))}, "y = y * s.cfg.by"),
        case("attribute of a float", lambda i: {"cfg": kit.extra(kit.MyFloat(1.0), float(i))}, "y = y * s.cfg.extra"),
        case(
            "dict that the model reads first", lambda i: {"cfg": {"k": float(i)}}, "y = y * s.cfg['k']", **READ_BEFORE
        ),
        case(
            "partial that the model calls first",
            lambda i: {"f": functools.partial(torch.mul, float(i + 1))},
            "y = y + s.lin(s.f(x))",
            before=["x = layer.f(x)"],
        ),
        case(
            "type of a dict's keys",
            lambda i: {"d": {1: 1} if i % 2 else {1.0: 1}},
            "y = y + (2 if isinstance(next(iter(s.d)), float) else 1)",
        ),
        case("range with the same items", lambda i: {"r": range(0, 3 + i % 2, 2)}, "y = y * s.r.stop"),
        case(
            "value in a mapping proxy",
            lambda i: {"d": types.MappingProxyType({"a": 1.0 if i % 2 else 1})},
            "y = y + (2 if isinstance(s.d['a'], float) else 1)",
        ),
        case(
            "argument that is the first layer's own buffer",
            lambda i: {"scale": torch.full((8,), float(i + 1))},
            "y = y * a + s.scale",
            args=[("a", "m.layers[0].scale")],
        ),
        case(
            "argument that is the previous layer's buffer",
            lambda i: {"scale": torch.full((8,), float(i + 1))},
            "y = y * a + s.scale",
            args=[("a", "m.layers[n - 1].scale")],
        ),
        case(
            "table keyed by a parameter", nothing, "y = y * TABLE[s.lin.weight]", after=tables(lambda m: m.lin.weight)
        ),
        case("table keyed by a module", nothing, "y = y * TABLE[s.lin]", after=tables(lambda m: m.lin)),
        case(
            "table keyed by an object",
            lambda i: {"key": kit.Box(by=1)},
            "y = y * TABLE[s.key]",
            after=tables(lambda m: m.key),
        ),
        case(
            "membership in a list outside",
            nothing,
            "y = y + (1 if s.lin in PARTS else 0)",
            after=parts(lambda m: m.lin, 0),
        ),
        case(
            "membership of a later layer",
            nothing,
            "y = y + (1 if s.lin in PARTS else 0)",
            after=parts(lambda m: m.lin, 3, 4),
        ),
        case(
            "subclass of an ordered dict",
            lambda i: {"d": kit.MyOrdered(k=float(i + 1))},
            "y = y * s.d['k']",
            before=["x = x * layer.d['k']"],
        ),
        case(
            "ordered dict that the model reads first",
            lambda i: {"d": collections.OrderedDict(k=float(i + 1))},
            "y = y * s.d['k']",
            before=["x = x * layer.d['k']"],
        ),
        case(
            "dtype",
            lambda i: {"kind": torch.float32 if i % 2 else torch.bfloat16},
            "y = y.to(s.kind).float() * (2 if s.kind == torch.float32 else 1)",
        ),
        case(
            "dtype that the model reads first",
            lambda i: {"kind": torch.float32 if i % 2 else torch.bfloat16},
            "y = y.to(s.kind).float()",
            before=["x = x.to(layer.kind).float()"],
        ),
        case(
            "function that the model calls first",
            lambda i: {"f": torch.sin if i % 2 else torch.cos},
            "y = s.f(y)",
            before=["x = layer.f(x)"],
        ),
        case(
            "function that is compared",
            lambda i: {"f": torch.sin if i % 2 else torch.cos},
            "y = y * (2 if s.f is torch.sin else 1)",
            before=["seen = layer.f"],
        ),
        case(
            "enum member",
            lambda i: {"colour": list(kit.Colour)[i % 3]},
            "y = y * (2 if s.colour is Colour.RED else s.colour.value)",
            before=["seen = layer.colour"],
        ),
        case(
            "range that the model reads first",
            lambda i: {"r": range(i + 1)},
            "y = y * len(s.r)",
            before=["seen = sum(layer.r)"],
        ),
        case("item of a tuple", lambda i: {"t": (1, float(i))}, "y = y * s.t[1]", before=["x = x + layer.t[1]"]),
        case(
            "item of a deque",
            lambda i: {"t": collections.deque([1, float(i)])},
            "y = y * s.t[1]",
            before=["x = x + layer.t[1]"],
        ),
        case(
            "nested dict",
            lambda i: {"d": {"a": {"b": float(i)}}},
            "y = y * s.d['a']['b']",
            before=["seen = layer.d['a']"],
        ),
        case(
            "object with a dict",
            lambda i: {"o": kit.Box(table={"k": float(i)})},
            "y = y * s.o.table['k']",
            before=["x = x + layer.o.table['k']"],
        ),
        case(
            "isinstance",
            lambda i: {"q": [] if i % 2 else ()},
            "y = y * (2 if isinstance(s.q, list) else 1)",
            before=["seen = isinstance(layer.q, list)"],
        ),
        case("zero and minus zero", lambda i: {"z": -0.0 if i % 2 else 0.0}, "y = y * math.copysign(2, s.z)"),
        case(
            "zero and minus zero in a tuple",
            lambda i: {"z": (1, -0.0 if i % 2 else 0.0)},
            "y = y * math.copysign(2, s.z[1])",
        ),
        case(
            "order of a set", lambda i: {"some": set([0, 8][:: -1 if i % 2 else 1])}, "y = y * (1 + next(iter(s.some)))"
        ),
        case("frozen dataclass in a set", lambda i: {"some": {kit.Frozen(float(i))}}, "y = y * next(iter(s.some)).by"),
        case("mangled slot", lambda i: {"o": kit.Slotted(float(i))}, "y = y * s.o.by", before=["seen = layer.o.by"]),
        case("property", lambda i: {"o": kit.Private(float(i))}, "y = y * s.o.by", before=["seen = layer.o.by"]),
        case(
            "argument that is transposed in place",
            nothing,
            "a.t_()",
            "y = y @ a",
            args=[("a", "m.square + (1 if n in (2, 4) else 2)")],
            after=square,
        ),
        case(
            "argument that is transposed in place, once for each layer",
            nothing,
            "a.t_()",
            "y = y @ a",
            args=[("a", "m.square + 1")],
            after=square,
        ),
        case(
            "deterministic algorithms around a call",
            nothing,
            "y = y * (2 if torch.are_deterministic_algorithms_enabled() else 1)",
            before=["torch.use_deterministic_algorithms(n in (2, 5))"],
        ),
        case(
            "view updated in place that aliases for some",
            nothing,
            "s.view.add_(1)",
            "y = y @ s.cache + s.other[0]",
            after=views,
        ),
        case(
            "view updated in place of a buffer that is read, for some",
            nothing,
            "s.view.add_(1)",
            "y = y @ s.cache + s.view[:8]",
            after=own_views,
        ),
        case(
            "view updated in place of a buffer that is read, for some, in pieces",
            nothing,
            "s.view.add_(1)",
            "y = attn(y @ s.cache + s.view[:8], Name(s.name))",
            after=own_views,
        ),
        case(
            "view updated in place of the previous layer's buffer, for some",
            nothing,
            "s.view.add_(1)",
            "y = y @ s.cache",
            after=neighbours,
        ),
        case(
            "buffers of one storage for some, updated in place",
            nothing,
            "s.two.add_(1)",
            "y = y * s.one + s.two",
            after=mixed,
        ),
        case(
            "set of which an item is a module",
            nothing,
            "y = y * (2 if s in s.holder[0].chosen else 1)",
            after=lambda m, space: setattr(m, "chosen", {m.layers[1], m.layers[4]}),
        ),
        case("module's attribute", lambda i: {"o": extra_module(float(i))}, "y = y * s.o.by"),
        case(
            "keyword default that the model calls first",
            lambda i: {"f": kit.keyword_default(float(i))},
            "y = y * s.f()",
            before=["x = x + layer.f()"],
        ),
        case(
            "closure that the model calls first",
            lambda i: {"f": kit.closure(float(i))},
            "y = y * s.f()",
            before=["x = x + layer.f()"],
        ),
        case(
            "hook's closure",
            nothing,
            "pass",
            after=lambda m, space: [
                layer.register_forward_hook(lambda s, a, o, k=i + 1: o * k) for i, layer in enumerate(m.layers)
            ],
        ),
        case(
            "buffer that is None in a middle one",
            lambda i: {"buf": None if i == 3 else nn.Buffer(torch.full((8,), 2.0))},
            "y = y if s.buf is None else y * s.buf",
            before=["seen = layer.buf"],
        ),
    )
}
