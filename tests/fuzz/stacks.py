"""Stacks of layers, as the text of their code and what each layer is given: what makes layers differ, and what may not.

A `Feature` is one thing that layers have.  Of features, `Stack` makes a model; it can be made again and again, alike.
"""

from __future__ import annotations

import dataclasses
import linecache
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.fuzz import kit, values
from tests.fuzz.values import Kind, Place

LAYERS = 6
FILE = "tests/fuzz/generated.py"
TEMPLATE = """\
class Layer(Base):
    def forward(self, x{params}):
        s = self
        {head}
        y = s.lin(x)
        {lines}
        return {returns}


class Model(BaseModel):
    def forward(self, x{inputs}):
        m = self
        {ahead}
        for n, layer in enumerate(self.layers):
            {before}
            {call}
            {after}
        return x
"""


class Base(nn.Module):
    """A layer that has a number and a name, as layers have; who reads them is no kind of any other."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.idx = i
        self.name = f"layers.{i}"


class BaseModel(nn.Module):
    def __init__(self, kind: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(i) for i in range(LAYERS))
        self.value = 1
        self.log: list[Any] = []
        self.probe = kit.Probe()


@dataclass
class Feature:
    """Lines of a layer's and the model's code, and what is prepared.

    call: the expression of the call, in which `CALL` stands for that of other features.  args, inputs: names or
    expressions of further arguments of a layer, of the model.  `prepare(model, space)` gets the globals of the code.
    copies: how many of the six layers may be copied at least, where that is known.
    """

    what: str
    prepare: Callable[[Any, dict[str, Any]], None] = lambda model, space: None
    head: str = ""
    lines: str = ""
    ahead: str = ""
    before: str = ""
    after: str = ""
    around: str = ""
    call: str = ""
    returns: str = ""
    args: Sequence[tuple[str, str]] = ()
    inputs: Sequence[tuple[str, Callable[[Any], Any]]] = ()
    copies: int | None = None


@dataclass
class Stack:
    """One case: `make` gives a model, its arguments and the globals of its code, each time the same."""

    what: str
    features: Sequence[Feature]
    copies: int | None = None
    source: str = field(init=False)

    def __post_init__(self) -> None:
        parts = self.features
        call = next((f.call for f in parts if f.call), "x = CALL")
        args = [value for f in parts for _, value in f.args]
        call = call.replace("CALL", f"layer({', '.join(['x', *args])})")
        around = [f.around for f in parts if f.around]
        if around:
            call = f"with {', '.join(around)}:\n                {call}"
        self.source = TEMPLATE.format(
            params="".join(f", {name}" for f in parts for name, _ in f.args),
            inputs="".join(f", {name}" for f in parts for name, _ in f.inputs),
            head=self._lines("head", 8),
            lines=self._lines("lines", 8),
            ahead=self._lines("ahead", 8),
            before=self._lines("before", 12),
            after=self._lines("after", 12),
            returns=next((f.returns for f in parts if f.returns), "y"),
            call=call,
        )
        self._code: Any = None

    def _lines(self, name: str, indent: int) -> str:
        lines = "\n".join(filter(None, (getattr(f, name) for f in self.features))) or "pass"
        return lines.replace("\n", "\n" + " " * indent)

    def make(self, decorate: Callable[[type], type] = lambda cls: cls) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        if self._code is None:
            self._code = compile(self.source, FILE, "exec")
        linecache.cache[FILE] = (len(self.source), None, self.source.splitlines(keepends=True), FILE)
        kit.Current.value, kit.Current.stack = 1.0, []
        values.KEPT.clear()
        kit.CLASSES.clear()
        space = {**vars(kit), "Base": Base, "BaseModel": BaseModel, "COUNT": 0, "PARTS": [], "TABLE": {}}
        exec(self._code, space)
        torch.manual_seed(0)
        model = decorate(space["Model"])(space["Layer"]).requires_grad_(False)
        x = torch.randn(7, 8)
        if "holder" in self.source:
            for layer in model.layers:
                layer.holder = [model]
        for feature in self.features:
            feature.prepare(model, space)
        inputs = [value(model) for f in self.features for _, value in f.inputs]
        return model, (x, *inputs), space


def puts(statements: str, ks: Sequence[int] = (0,) * LAYERS, **names: Any) -> Callable[[Any, dict[str, Any]], None]:
    """A `prepare` that runs `statements` for each layer `s`, the i-th of model `m`, of variant k.  names: globals."""

    def prepare(model: Any, space: dict[str, Any]) -> None:
        space.update(names)
        lines = statements.replace("\n", "\n    ") or "pass"
        exec(f"def put(s, i, m, k):\n    {lines}", space)  # once: what it makes has the same globals in all layers
        for i, layer in enumerate(model.layers):
            space["put"](layer, i, model, ks[i])

    return prepare


# How layers differ: the variant of each.

Pattern = tuple[str, list[int]]


def same() -> Pattern:
    return "all alike", [0] * LAYERS


def pattern(rng: random.Random, variants: int) -> Pattern:
    """Variants of the layers, at least two of them."""
    other = rng.randrange(1, variants)
    base = rng.choice([k for k in range(variants) if k != other])
    which = rng.randrange(5)
    if which == 0:
        at = rng.randrange(LAYERS)
        return f"layer {at} differs", [other if i == at else base for i in range(LAYERS)]
    if which == 1:
        return "each differs", [i % variants for i in range(LAYERS)]
    if which == 2:
        period = rng.choice([2, 3])
        return f"periodic by {period}", [(base, other, 0)[i % period] for i in range(LAYERS)]
    if which == 3:
        return "the last differs", [base] * (LAYERS - 1) + [other]
    at = rng.randrange(2, LAYERS - 1)
    return f"from layer {at} on", [other if i >= at else base for i in range(LAYERS)]


# Values.

FIRST = (
    "nobody",
    "nobody",
    "nobody",
    "the model, before",
    "the model, the holder alone",
    "the model, the value alone",
    "the model, after",
    "the model, ahead",
    "another module",
    "the layer, otherwise",
)
USES = (
    "y = y * (1 + 0.25 * ({}))",
    "y = y + 0.5 * ({})",
    "y = y + torch.sin(x * ({}))",
    "y = y * 1.5 if ({}) > 1 else y",
)


def value(
    rng: random.Random,
    kind: Kind,
    where: Place,
    ks: Pattern,
    first: str = "nobody",
    name: str = "v",
    shared: bool = False,
    read: str | None = None,
) -> Feature:
    """A value of `kind` at `where`, of a variant for each layer.  shared: equal variants are one object."""

    def fill(text: str, layer: str) -> str:
        return text.replace("NAME", name).replace("@", layer)

    def reading(text: str, layer: str) -> str:
        access = fill(where.access, layer)
        if where.name == "argument":
            access = f"a_{name}" if layer == "s" else f"{layer}.{name}"
        text = re.sub(r"(?<!')\by\b", "x", text) if layer != "s" else text
        return fill(text.replace("$", access), layer)

    read = read or rng.choice(kind.reads)
    again = rng.choice(kind.reads)
    number = not (kind.tensors or "tensor" in kind.name or re.search(r"\b[xy]\b|torch", read))
    use = rng.choice(USES) if number else USES[0]
    feature = Feature(
        f"{kind.name} as {where.name.replace('NAME', name)}, {ks[0]}, read by {read!r}, first by {first}"
        + (", shared" if shared else ""),
        lines=use.format(reading(read, "s")),
    )
    outside = reading(again, "layer")
    used = f"x = x * (1 + 0.125 * ({outside}))" if rng.random() < 0.5 else f"seen_{name} = {outside}"
    if first == "the model, before":
        feature.before = used
    elif first == "the model, the value alone":
        feature.before = f"seen_{name} = {reading('$', 'layer')}"
    elif first == "the model, the holder alone":
        whole = where.access.startswith("@.NAME") and where.access != "@.NAME"
        feature.before = f"seen_{name} = layer.{name if whole else 'lin'}"
    elif first == "the model, after":
        feature.after = used
    elif first == "the model, ahead":
        feature.ahead = f"for layer in self.layers:\n    {used}"
    elif first == "another module":
        feature.before = f"x = m.probe(x, {outside})"
    elif first == "the layer, otherwise":
        feature.head = "" if re.search(r"\by\b", again) else f"before_{name} = {reading(again, 's')}"
    if where.name == "argument":
        feature.args = [(f"a_{name}", f"layer.{name}")]

    def prepare(model: Any, space: dict[str, Any]) -> None:
        made: dict[int, Any] = {}
        table = space.setdefault(f"TABLE_{name}", {})
        for k, layer in zip(ks[1], model.layers, strict=True):
            item = made.setdefault(k, kind.make(k)) if shared else kind.make(k)
            where.put(layer, name, item, table)

    feature.prepare = prepare
    return feature


# What nobody reads, and names: layers that have only this may be copied.


# Where -> what is put there.
UNREAD = {
    "the layer": "s.unread, s.unread_table = i, {'a': [i]}",
    "a submodule": "s.lin.unread = f'lin.{i}'",
    "a deep submodule": "deep(s, 'unread', {i}, None)",
    "a read object": "s.mixed.unread = i",
    "functions and objects": "s.unread_function = lambda y, k=i: y * k\n"
    "s.unread_object = Box(by=i, inner=Box(by=str(i)))",
}


def unread(where: str) -> Feature:
    lines = "y = y * s.mixed.scale" if where == "a read object" else ""
    prepare = puts(f"s.mixed = Box(scale=1.5)\n{UNREAD[where]}", deep=values.deep)
    return Feature(f"unread attributes of {where}", prepare, lines=lines)


# What layer `s` gets, from tensor `t` -> what it computes with that.
TENSORS = (
    ("s.register_buffer('t', t)", "y + s.t"),
    ("s.t = t", "y * s.t"),
    ("s.ts = [t, t * 2]", "y * s.ts[0] + s.ts[1]"),
    ("s.table = {'t': t}", "y * s.table['t']"),
    ("s.norm = nn.LayerNorm(8).requires_grad_(False); s.norm.weight.copy_(t)", "s.norm(y)"),
)


def tensors(rng: random.Random) -> Feature:
    put, line = TENSORS[rng.randrange(len(TENSORS))]
    return Feature(f"tensors ({line})", puts(f"t = torch.full((8,), 1.0 + i); {put}"), lines=f"y = {line}")


NAMED = Feature("a name into an op", lines="y = attn(y, Name(s.name))")


# What is not a value at a place.


def _context(rng: random.Random, ks: list[int]) -> Feature:
    chosen = tuple(i for i, k in enumerate(ks) if k)
    condition = f"n in {chosen}"
    around, lines = rng.choice(
        [
            (f"torch.autocast('cpu', torch.bfloat16, enabled={condition})", "y = y.float()"),
            (f"torch.set_grad_enabled({condition})", "y = y * (2 if torch.is_grad_enabled() else 1)"),
            (f"(Doubles() if {condition} else contextlib.nullcontext())", "y = torch.sin(y)"),
            (f"using({ks}[n] + 1.0)", "y = y * Current.value"),
            (f"Using({ks}[n] + 1.0)", "y = y * Current.value"),
        ]
    )
    return Feature(f"context {around}", around=around, lines=lines)


def _switch(rng: random.Random, ks: list[int]) -> Feature:
    before, after, lines = rng.choice(
        [
            (
                "torch.use_deterministic_algorithms(bool({k}))",
                "torch.use_deterministic_algorithms(False)",
                "y = y * (2 if torch.are_deterministic_algorithms_enabled() else 1)",
            ),
            ("Current.value = {k} + 1.0", "Current.value = 1.0", "y = y * Current.value"),
            ("m.value = {k}", "m.value = 1", "y = y * s.holder[0].value"),
            ("layer.training = bool({k})", "layer.training = True", "y = y * (2 if s.training else 1)"),
            ("layer.lin.scale = {k}", "pass", "y = y * s.lin.scale"),
            ("Current.stack.append({k})", "pass", "y = y * (1 + sum(Current.stack))"),
            ("Current.stack.append({k})", "Current.stack.pop()", "y = y * (1 + Current.stack[-1])"),
            ("m.log.append({k})", "m.log.pop()", "y = y * (1 + last(s.holder[0].log))"),
            ("global COUNT; COUNT = {k}", "pass", "y = y * (1 + COUNT)"),
            ("TABLE['k'] = {k}", "pass", "y = y * (1 + TABLE['k'])"),
            ("layer.late = {k} + 1", "del layer.late", "y = y * s.late"),
            ("setattr(m, 'flag', {k})", "pass", "y = y * (1 + getattr(s.holder[0], 'flag', 0))"),
        ]
    )
    before = before.replace("{k}", f"{ks}[n]")
    feature = Feature(f"switched by {before!r}, {after!r}", lines=lines)
    if "global" in before:
        feature.ahead, before = "global COUNT", before.split("; ")[1]
    feature.before, feature.after = before, after
    return feature


def _counting(rng: random.Random, ks: list[int]) -> Feature:
    """Layers that change Python's state, and read it."""
    line = rng.choice(
        [
            "s.calls = s.calls + 1; y = y * s.calls",
            "s.holder[0].value += 1; y = y * s.holder[0].value",
            "y = y * (1 + len(s.holder[0].log)); s.holder[0].log.append(1)",
            "y = y * (1 + COUNT); COUNT += 1",
            "y = y * (1 + len(PARTS)); PARTS.append(s)",
            "TABLE[len(TABLE)] = 1; y = y * len(TABLE)",
            "Current.value = Current.value + 0.5; y = y * Current.value",
            "Current.stack.append(1); y = y * len(Current.stack)",
            "y = y * s.nxt[0].level; s.nxt[0].level = s.level + 1",
            "s.shared['n'] = s.shared['n'] + 1; y = y * s.shared['n']",
            "s.shared['n'] = 2; y = y * s.shared['n']; s.shared['n'] = 1",
            "y = y * s.queue.pop()",
            "y = y * s.queue[-1]; s.queue.append(s.queue[-1] + 1)",
            "y = y * next(s.numbers)",
            "s.seen = y.shape[1]; y = y * s.seen; s.seen = None",
            "y = y + s.holder[0].carry; s.holder[0].carry = y * 0.5",
        ]
    )

    def prepare(model: Any, space: dict[str, Any]) -> None:
        shared, queue, numbers = {"n": 1}, [1, 2, 3, 4, 5, 6], iter(range(1, 9))
        model.carry = torch.zeros(8)
        for i, layer in enumerate(model.layers):
            layer.calls, layer.level, layer.seen = ks[i], 1, None
            layer.shared, layer.queue, layer.numbers = shared, queue, numbers
            layer.nxt = [model.layers[(i + 1) % LAYERS]]

    head = "global COUNT" if "COUNT" in line else ""
    return Feature(f"changes state: {line}", prepare, head=head, lines=line)


# What it is of a layer that is asked for -> how.
IDENTITIES = {
    "layer": (
        "s is s.some[0]; s in s.some; s in s.some_set; s == s.some[0]; id(s) in s.ids; id(s) == s.ids[0]; "
        "s.holder[0].layers[s.which] is s; s.some_ref[0]() is s; s.lin is s.some[0].lin; hash(s) == s.hashes[0]"
    ),
    "lin": "s.lin in s.parts; s.lin in PARTS; any(s.lin is p for p in PARTS)",
    "weight": "s.lin.weight is s.parts[0]; s.lin.weight is PARTS[0]; any(s.lin.weight is p for p in PARTS)",
    "bias": "s.lin.bias is PARTS[0]",
    "cfg": "s.cfg is PARTS[0]; any(s.cfg is p for p in PARTS); s.cfg is s.holder[0].layers[s.which].cfg",
    "box": "s.box is PARTS[0]; s.box == PARTS[0]; s.box in PARTS; id(s.box) in s.ids",
    "shared box": "s.box is SHARED",
    "model box": "s.box is s.holder[0].box",
    "tied module": "s.lin is s.lin2",
    "tied weight": "s.lin.weight is s.lin2.weight",
    "tied dict": "s.cfg is s.cfg2",
    "self": "s.first is s",
    "method": "s.f == s.holder[0].layers[s.which].f",
    "sentinel": "s.tag is s.holder[0].tag; s.tag == s.holder[0].tag",
}


def _identity(rng: random.Random, ks: list[int]) -> Feature:
    some = [i for i, k in enumerate(ks) if k]
    what, condition = rng.choice([(what, c) for what, all_ in IDENTITIES.items() for c in all_.split("; ")])

    def prepare(model: Any, space: dict[str, Any]) -> None:
        layers = list(model.layers)
        model.box, model.tag = kit.Box(by=1), object()
        for i, layer in enumerate(layers):
            mine = i in some
            layer.cfg = {"k": 1}
            layer.cfg2 = layer.cfg if mine else {"k": 1}
            layer.box = {"shared box": kit.SHARED, "model box": model.box}.get(what) if mine else None
            layer.box = layer.box or kit.Box(by=1)
            layer.tag = model.tag if mine else object()
            layer.first = layer if mine else layers[0]
            layer.f = kit.Box.get.__get__(layer.box)
            layer.lin2 = layer.lin
            if what == "tied weight" or (what == "tied module" and not mine):
                layer.lin2 = nn.Linear(8, 8).requires_grad_(False)
                if mine:
                    layer.lin2.weight = layer.lin.weight
        chosen = [layers[i] for i in some] or [layers[0]]
        part = {"lin": "lin", "weight": "lin.weight", "bias": "lin.bias", "cfg": "cfg", "box": "box"}.get(what)
        parts = [kit.operator.attrgetter(part)(s) if part else s for s in chosen]
        space["PARTS"].extend(parts)
        for layer in layers:
            layer.which = layers.index(chosen[0])
            layer.some, layer.some_set = list(chosen), set(chosen)
            layer.ids = [id(p) for p in parts]
            layer.parts = list(parts) if what != "lin" else tuple(parts)
            layer.some_ref = [kit.weakref.ref(chosen[0])]
            layer.hashes = [hash(chosen[0])]

    return Feature(f"identity: {condition}, layers {some}", prepare, lines=f"y = y * (2 if {condition} else 1)")


@dataclass(frozen=True)
class Alias:
    """put: as in `puts`; k: whether the layer is among SOME.  lines: one is chosen.  argument: what `a` is in the
    call, extra: what the model's argument `extra` is of the first of SOME."""

    name: str
    put: str = ""
    lines: tuple[str, ...] = ("y = y * s.scale + s.other",)
    argument: str = ""
    extra: str = ""


_READ, _ADDED = "y = y * a + s.scale", "s.scale.add_(1); y = y * a + s.scale"
_EITHER = (_READ, "s.scale.add_(1); y = y * a", "y = y * a; s.other.add_(a)")
_SHARED, _VIEW = "if k: s.scale = m.scale", "if k: s.other = s.scale.view(8)"
GIVEN = """\
s.register_buffer("scale", torch.full((8,), 1.0 + i))
s.register_buffer("other", torch.full((8,), 0.5 * i))
s.lin2 = nn.Linear(8, 8).requires_grad_(False)
"""
ALIASES = (
    Alias("weights tied in some", "if k: s.lin2.weight = s.lin.weight", ("y = y + s.lin2(x)",)),
    Alias("weights tied with the first", "if k: s.lin.weight = m.layers[0].lin.weight"),
    Alias("buffers shared by some", "if k: s.other = s.scale"),
    Alias("buffers of one storage", "s.scale, s.other = pool[i], pool[i + 6 * k]"),
    Alias("buffer is a view in some", _VIEW),
    Alias("the model's buffer", _SHARED),
    Alias("buffer updated in place", "", ("s.scale.add_(1); y = y * s.scale",)),
    Alias("shared buffer updated in place", _SHARED, ("s.scale.add_(1); y = y * s.scale",)),
    Alias("view updated in place", _VIEW, ("s.other.add_(1); y = y * s.scale + s.other",)),
    Alias("the first's buffer as argument", "", _EITHER, "m.layers[0].scale"),
    Alias("its own buffer as argument", "", _EITHER, "layer.scale"),
    Alias("the previous layer's buffer as argument", "", _EITHER, "m.layers[n - 1].scale"),
    Alias("the next layer's buffer as argument", "", _EITHER, "m.layers[(n + 1) % 6].scale"),
    Alias("a view of its buffer as argument", "", _EITHER, "layer.scale[:]"),
    Alias("a buffer as argument to some", "", (_READ,), "layer.scale if n in SOME else m.scale"),
    Alias("the model's argument is a buffer", "", (_READ, _ADDED), "extra", "layer.scale"),
    Alias("the model's argument is a view of a buffer", "", (_ADDED,), "extra", "layer.scale[:]"),
    Alias("an argument is updated in place", "", ("a.add_(1); y = y + a",), "x * 1.5"),
    Alias("an argument is transposed in place", "", ("a.t_(); y = y @ a; a.t_()",), "m.square + (n in SOME)"),
    Alias("the argument twice", "", ("y = y + a * x",), "x if n in SOME else x * 2"),
    Alias("the first's weight as argument", "", ("y = y @ a + s.lin.weight.sum()",), "m.layers[0].lin.weight"),
    Alias("a result is a buffer", "", ("pass",)),
    Alias("a result is the argument in some", "s.chosen = SOME", ("y = x if s.idx in s.chosen else y",)),
)


def _aliasing(rng: random.Random, ks: list[int]) -> Feature:
    some = tuple(i for i, k in enumerate(ks) if k) or (3,)
    alias = rng.choice(ALIASES)
    lines = rng.choice(alias.lines)

    def prepare(model: Any, space: dict[str, Any]) -> None:
        model.register_buffer("scale", torch.full((8,), 3.0))
        model.square = torch.arange(64.0).div(64).reshape(8, 8)
        pool = torch.arange(1.0, 97.0).div(16).reshape(12, 8)
        puts(GIVEN + alias.put, [int(i in some) for i in range(LAYERS)], pool=pool, SOME=some)(model, space)

    feature = Feature(f"aliasing: {alias.name}, layers {some}: {lines}", prepare, lines=lines)
    if alias.argument:
        feature.args = [("a", alias.argument.replace("SOME", str(some)))]
    if alias.extra:
        feature.inputs = [("extra", lambda model: eval(alias.extra, {"layer": model.layers[some[0]]}))]
    if alias.name == "a result is a buffer":
        feature.returns, feature.call, feature.after = "y, s.scale", "x, kept = CALL", "x = x * kept + layer.other"
    return feature


# What is done to layer `s` of variant k -> what it computes with that.
MODULES = (
    ("if k: s.lin = nn.Linear(8, 8, bias=False)", ""),
    ("s.register_buffer('buf', None if k else torch.full((8,), 2.0))", "y = y if s.buf is None else y * s.buf"),
    ("s.extra = None if k else nn.Linear(8, 8)", "y = y if s.extra is None else s.extra(y)"),
    ("if k: s.lin = TripleLinear(8, 8)", ""),
    ("if k: s.lin.__class__ = TripleLinear", ""),
    ("if k: s.forward = patched(s.lin, 5)", ""),
    ("if k: s.lin.forward = patched(s.lin, 5)", ""),
    ("s.lin.forward = patched(s.lin, k + 1)", ""),
    ("if k: s.lin.scaled = scaled", "y = s.lin.scaled(y) if hasattr(s.lin, 'scaled') else y"),
    ("if k: s.register_forward_hook(hook(2))", ""),
    ("if k: s.lin.register_forward_hook(hook(2))", ""),
    ("if k: s.lin.register_forward_pre_hook(pre_hook)", ""),
    ("s.register_forward_hook(hook(k + 1))", ""),
    ("s.lin.register_forward_hook(hook(k + 1))", ""),
    ("if k: s.register_forward_hook(keyword_hook, with_kwargs=True)", ""),
    ("for f in (hook(2), other_hook)[:: -1 if k else 1]: s.lin.register_forward_hook(f)", ""),
    ("w = 16 if k else 8; s.up, s.down = nn.Linear(8, w), nn.Linear(w, 8)", "y = s.down(torch.sin(s.up(y)))"),
    (
        "s.extra = nn.Linear(8, 8, dtype=torch.float64 if k else torch.float32)",
        "y = s.extra(y.to(s.extra.weight.dtype)).float()",
    ),
    (
        "if k: s.lin.weight = nn.Parameter(s.lin.weight.t().contiguous().t())",
        "y = y * (2 if s.lin.weight.is_contiguous() else 1)",
    ),
    ("s.extra = nn.Linear(8, 8)  # trained: k", "y = y * (2 if s.extra.weight.requires_grad else 1)"),
    ("if k: s.parts = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])", "for p in getattr(s, 'parts', ()): y = p(y)"),
    ("s.parts = nn.Sequential(*[nn.Tanh(), nn.Linear(8, 8)][:: -1 if k else 1])", "y = s.parts(y)"),
    ("s.parts = nn.Sequential(*(nn.Tanh() for _ in range(k + 1)))", "y = s.parts(y)"),
    ("s.parts = nn.Sequential(*(nn.Tanh() for _ in range(k + 1)))", "y = y * len(s.parts)"),
    ("s.parts = nn.Sequential(*(nn.Tanh() for _ in range(k + 1)))", "for p in s.parts: y = p(y)"),
    ("s.extra = nn.LayerNorm(8, eps=0.1 * k or 1e-5)", "y = s.extra(y)"),
    ("s.extra = nn.LeakyReLU(0.1 * (k + 1))", "y = s.extra(y)"),
    ("s.extra = (nn.Tanh, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.GELU, nn.ELU)[k]()", "y = s.extra(y)"),
    ("s.extra = nn.Linear(8, 8).train(bool(k))", "y = y * (2 if s.extra.training else 1)"),
    ("s.parts = nn.ModuleList([nn.Tanh()]); s.parts.by = [1, k]", "y = y * s.parts.by[1]"),
    ("if k: s.lin.scale = 2", "y = y * getattr(s.lin, 'scale', 1)"),
    ("if k: s.more = nn.Tanh()", "y = y * len(list(s.named_children()))"),
    ("if k: s.more = nn.Linear(8, 8)", "y = y * (0.1 * len(list(s.parameters())))"),
)
HELPERS: dict[str, Any] = {
    "patched": lambda lin, k: lambda x: nn.functional.linear(x, lin.weight) * k,
    "scaled": lambda y: y * 3,
    "hook": lambda k: lambda s, a, o: o * k,
    "other_hook": lambda s, a, o: o + 1,
    "pre_hook": lambda s, a: (a[0] * 2,),
    "keyword_hook": lambda s, a, kw, o: o * 2,
}


def _modules(rng: random.Random, ks: list[int]) -> Feature:
    put, lines = rng.choice(MODULES)

    trained = f"s.requires_grad_({'trained' in put} and bool(k))"
    return Feature(f"modules: {put}, {ks}", puts(f"{put}\n{trained}", ks, **HELPERS), lines=lines)


# How the model calls its layers: a further parameter, what each layer gets (SOME: `n` is among some), what it does.
CALLS = (
    ("k", "KS[n]", "y = y * (1 + k)"),
    ("k", "n", "y = y * (1 + k)"),
    ("r", "None if SOME else x", "y = y if r is None else y + r"),
    ("k=1", "*(), **({'k': 3} if SOME else {})", "y = y * k"),
    ("k", "[1, KS[n]]", "y = y * sum(k)"),
    ("k", "{'a': KS[n] + 1}", "y = y * k['a']"),
    ("k", "1 if SOME else 1.0", "y = y * vary(k)"),
    ("f", "torch.sin if SOME else torch.cos", "y = f(y)"),
    ("other", "m.layers[n - 1]", "y = y + other.lin(x)"),
    ("a", "x if SOME else x[:1]", "y = y + a"),
    ("a", "x.double() if SOME else x", "y = (y + a / 3).float()"),
    ("f", "functools.partial(give, KS[n] + 1)", "y = y * f()"),
)


def _calls(rng: random.Random, ks: list[int]) -> Feature:
    some = tuple(i for i, k in enumerate(ks) if k)
    which = rng.randrange(len(CALLS) + 2)
    if which == len(CALLS):
        return Feature("called twice", call="x = CALL + CALL")
    if which > len(CALLS):
        return Feature("a flag of the model", before=f"m.value = {ks}[n]", lines="y = y * (1 + s.holder[0].value)")
    name, given, line = CALLS[which]
    given = given.replace("KS", str(ks)).replace("SOME", f"n in {some}")
    return Feature(f"argument {name}: {given}", args=[(name, given)], lines=line)


SPECIALS: tuple[Callable[[random.Random, list[int]], Feature], ...] = (
    _context,
    _switch,
    _counting,
    _identity,
    _identity,
    _aliasing,
    _aliasing,
    _modules,
    _modules,
    _calls,
)


def generate(seed: int) -> tuple[str, Stack]:
    """The class of a case (`value`, `special`, `two`, `benign`) and its stack."""
    rng = random.Random(seed)
    kinds, places = values.KINDS, values.PLACES
    turn = seed % 20
    features: list[Feature]
    if turn < 9:
        kind = kinds[(seed // 20 * 9 + turn) % len(kinds)]
        features = [
            value(
                rng, kind, rng.choice(places), pattern(rng, kind.variants), rng.choice(FIRST), shared=rng.random() < 0.3
            )
        ]
        return "value", Stack(_what(features), features)
    if turn < 13:
        features = [rng.choice(SPECIALS)(rng, pattern(rng, rng.choice([2, 6]))[1])]
        return "special", Stack(_what(features), features)
    if turn < 16:
        features = []
        for name in ("v", "w"):
            kind = rng.choice(kinds)
            ks = pattern(rng, kind.variants) if rng.random() < 0.7 else same()
            features.append(value(rng, kind, rng.choice(places), ks, rng.choice(FIRST), name, rng.random() < 0.3))
        if rng.random() < 0.4:
            features[rng.randrange(2)] = rng.choice(SPECIALS)(rng, pattern(rng, rng.choice([2, 6]))[1])
        return "two", Stack(_what(features), features)
    return "benign", benign(rng, ALIKE[(seed // 20 * 4 + turn - 16) % len(ALIKE)])


# Kinds of which one value is as good as another that is alike, read without changing it.
UNLIKE = (
    "iterator",
    "factory",
    "weak reference",
    "method of a container",
    "code of one name",
    "array",
    "module",
    "name object",
)
ALIKE = tuple(
    dataclasses.replace(k, reads=tuple(r for r in k.reads if "holder" not in r))
    for k in values.KINDS
    if k.name not in UNLIKE
)


def benign(rng: random.Random, kind: Kind) -> Stack:
    """Layers of which all later ones of a kind may be copied."""
    own = [p for p in values.PLACES if p.own]
    copies = LAYERS - 1
    ks: Pattern = same()
    if rng.random() < 0.25 and not kind.tensors:
        copies = LAYERS - 2
        ks = "periodic by 2", [i % 2 for i in range(LAYERS)]
    elif kind.tensors and rng.random() < 0.5:
        ks = "each differs", list(range(LAYERS))
    features = [value(rng, kind, rng.choice(own), ks, shared=rng.random() < 0.3)]
    if rng.random() < 0.3:
        features.append(value(rng, rng.choice(ALIKE), rng.choice(own), same(), name="w"))
    features += [unread(w) for w in rng.sample(list(UNREAD), rng.randrange(1, 4))]
    if rng.random() < 0.6:
        features.append(tensors(rng))
    if rng.random() < 0.5:
        features.append(NAMED)
    return Stack(_what(features), features, copies)


def _what(features: Sequence[Feature]) -> str:
    return " + ".join(f.what for f in features)
