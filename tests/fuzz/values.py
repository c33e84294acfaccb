"""Kinds of values that layers may differ by, where a layer keeps one, and how it is read.

In the text of a reading `$` stands for the expression that gives the value, in that of a place `@` for the layer.
"""

from __future__ import annotations

import collections
import copy
import datetime
import fractions
import functools
import operator
import pathlib
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.fuzz import kit
from tests.fuzz.kit import Box


@dataclass(frozen=True)
class Kind:
    """`make(k)` is the value of variant k, of 0 to `variants` - 1.  A reading gives a number or a tensor.

    tensors: a difference is one of tensors alone, so layers that differ by it may be copied.
    """

    name: str
    make: Callable[[int], Any]
    reads: tuple[str, ...]
    variants: int = 6
    tensors: bool = False


def reads(*texts: str) -> tuple[str, ...]:
    return tuple(read for text in texts for read in text.split("; "))


def kind(name: str, make: Callable[[int], Any], *texts: str, variants: int = 6, tensors: bool = False) -> Kind:
    return Kind(name, make, reads(*texts), variants, tensors)


def options(name: str, values: tuple[Any, ...], *texts: str) -> Kind:
    return Kind(name, lambda k: copy.deepcopy(values[k]), reads(*texts), len(values))


def makers(name: str, values: tuple[Callable[[], Any], ...], *texts: str) -> Kind:
    return Kind(name, lambda k: values[k](), reads(*texts), len(values))


NUMBER = reads(
    "$; float($); ($ + 1); abs(-$); min($, 4); (2 if $ > 2 else 1); (2 if $ == 1 else 1); "
    "(2 if $ in (1, 3) else 1); bool($); len(str($ * 100)); len(text($ * 100)); matched($); "
    "{0: 1, 1: 3}.get($, 2); (not $); round($ * 1.5); (2 if isinstance($, int) else 1) * $; max([$, 1]); "
    "counted($); (2 if $ != @.holder[0].value else 1)"
)
SEQUENCE = reads(
    "$[1]; $[-1]; sum($); max($); sorted($)[0]; sorted($, reverse=True)[0]; len($); looped($); last($); "
    "unpacked($); matched_sequence($); (2 if 3 in $ else 1); functools.reduce(operator.add, $); "
    "len([v for v in $ if v > 2]); spread(*$); sum(map(float, $)); sum(a * b for a, b in zip($, (1, 2))); "
    "sum(n * v for n, v in enumerate($)); any(v > 3 for v in $); list($)[1]; tuple($)[1]; "
    "operator.itemgetter(1)($); tried_index($, 1); tried_index($, 2); len(str(list($))); list(reversed($))[0]; "
    "sum(itertools.chain($, (1,))); len(set($))"
)
MAPPING = reads(
    "$['k']; $.get('k'); $.get('k3', 2); sum($.values()); next(iter($.values())); max(v for _, v in $.items()); "
    "('k3' in $); dict($)['k']; {**$}['k']; tried_key($, 'k'); tried_key($, 'k3'); named(**$); "
    "operator.itemgetter('k')($); $.copy()['k']; len($); (2 if $ == {'k': 1.0} else 1); list($.items())[0][1]; "
    "len(list($.keys())[0]); functools.reduce(operator.add, $.values())"
)
DICT = (*MAPPING, *reads("($ | {'z': 1})['k']; dict($, z=1)['k']; matched_map($); bool($.get('k'))"))
BY = reads("$.by; getattr($, 'by'); getattr($, 'b' + 'y'); tried_attribute($, 'by'); operator.attrgetter('by')($)")
OBJECT = (*BY, *reads("vars($)['by']; $.__dict__['by']; (2 if hasattr($, 'by') else 1) * $.by; sum(vars($).values())"))
DATACLASS = (
    *BY,
    *reads(
        "dataclasses.asdict($)['by']; dataclasses.replace($, other=2.0).by; "
        "sum(getattr($, f.name) for f in dataclasses.fields($)); dataclasses.astuple($)[0]; "
        "(2 if $ == type($)(1.0) else 1); matched_point($)"
    ),
)
CALL = reads("$(); $(1); sum(map($, (1, 2)))")


def tensor(k: int) -> torch.Tensor:
    return torch.full((8,), float(k + 1))


def kept(make: Callable[[Any], Any], value: Any) -> Any:
    """A weak reference with what it refers to."""
    ref = make(value)
    KEPT.append(value)
    return ref


KEPT: list[Any] = []


def deleted(k: int) -> Any:
    """The attribute is missing in odd variants."""
    return Box(by3=2.0) if k % 2 else Box(by=1.0)


COLOURS = tuple(kit.Colour)
NAN = float("nan")

KINDS: tuple[Kind, ...] = (
    kind("int", lambda k: k, *NUMBER),
    kind("large int", lambda k: 2**40 + k, "($ - 2**40); ($ % 7); len(str($ % 2000))"),
    kind("float", lambda k: k / 2, *NUMBER),
    options("signed zero", (0.0, -0.0), "math.copysign(1, $); len(str($)); (2 if str($)[0] == '-' else 1)"),
    options("signed zeros in a tuple", ((1, 0.0), (1, -0.0)), "math.copysign(1, $[1]); len(str($[1]))"),
    options("signed zeros in a dict", ({"k": 0.0}, {"k": -0.0}), "math.copysign(1, $['k']); len(text($['k']))"),
    options("nan or not", (1.0, NAN), "(2 if $ != $ else 1); (2 if math.isnan($) else 1); len(str($))"),
    options("sign of nan", (NAN, -NAN), "math.copysign(1, $)"),
    options("infinity", (1.0, float("inf"), float("-inf")), "(2 if math.isinf($) else 1); min(max($, -2), 2)"),
    options(
        "bool, int or float",
        (True, 1, 1.0),
        "vary($); (2 if isinstance($, bool) else 1); (2 if $ is True else 1); len(str($)); "
        "(2 if type($) is float else 1); len(text($)); type($)(2.5); len(type($).__name__); "
        "(torch.ones((), dtype=torch.int64) * $).to(torch.float64).mul(0.3)",
    ),
    options("false, zero or None", (False, 0, None, 0.0), "vary($); (2 if $ is None else 1); len(str($))"),
    options("types in a tuple", ((1, 1), (1, 1.0), (1, True)), "vary($[1]); vary(last($)); len(str($))"),
    options("types in a dict", ({"k": 1}, {"k": 1.0}, {"k": True}), "vary($['k']); vary($.get('k')); vary(named(**$))"),
    options("list or tuple", ([1, 2], (1, 2)), "(2 if isinstance($, list) else 1); len(str($))"),
    options(
        "dict or ordered",
        ({"k": 1}, collections.OrderedDict(k=1)),
        "(type($) is dict); (2 if isinstance($, collections.OrderedDict) else 1)",
    ),
    options("set or frozenset", ({1}, frozenset({1})), "(2 if isinstance($, frozenset) else 1); (type($) is set)"),
    options("str or bytes", ("a", b"a"), "(2 if isinstance($, str) else 1); (2 if $ == 'a' else 1)"),
    kind(
        "str",
        lambda k: f"n{k}",
        "int($[1:]); (2 if $.endswith('3') else 1); (ord($[-1]) - 47); (2 if $ in ('n1', 'n2') else 1); "
        "(2 if $ == 'n1' else 1); len(shown($) * int($[1])); {'n0': 1, 'n1': 2}.get($, 3); matched($); "
        "(2 if $ > 'n2' else 1); sorted([$, 'n2']).index($); int($.replace('n', '2')); len($.partition('3')[1]); "
        "len([c for c in $ if c == '1']); (2 if $.upper() == 'N1' else 1); int('%s' % $[1])",
    ),
    kind("str of another length", lambda k: "a" * (k + 1), "len($); len(text($)); len('-'.join($)); $.count('a')"),
    kind("path in a str", lambda k: f"/tmp/n{k}", "int($[-1]); (2 if $.endswith('1') else 1)"),
    kind("bytes", lambda k: bytes([k + 1, 1]), "$[0]; (2 if $ == b'\\x01\\x01' else 1); int.from_bytes($[:1], 'big')"),
    options("None or a number", (None, 1, 2), "(1 if $ is None else 2); ($ or 3); matched($); ($ is not None)"),
    kind("complex", lambda k: complex(k, 1), "$.real; abs($); (2 if $ == 1 + 1j else 1)"),
    kind("fraction", lambda k: fractions.Fraction(k + 1, 7), "$.numerator; float($)"),
    kind("duration", lambda k: datetime.timedelta(days=k), "$.days"),
    kind("path", lambda k: pathlib.PurePosixPath(f"/tmp/n{k}"), "int($.name[1:]); len(str($.name))"),
    options(
        "dtype",
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        "(2 if $ == torch.float32 else 1); $.itemsize; (2 if $ is torch.bfloat16 else 1); "
        "(torch.ones((), dtype=$) / 3).float(); {torch.float32: 1, torch.float64: 2}.get($, 3); "
        "x.to($).float().sum(); torch.finfo($).bits / 16; len(str($))",
    ),
    options("device", (torch.device("cpu"), torch.device("meta")), "(2 if $.type == 'cpu' else 1); len(str($))"),
    options(
        "enum",
        COLOURS,
        "$.value; (2 if $ is Colour.RED else 1); (2 if $ == Colour.GREEN else 1); len($.name); matched_colour($); "
        "{Colour.RED: 1, Colour.GREEN: 2}.get($, 3); (2 if $ in (Colour.RED, Colour.BLUE) else 1); "
        "list(Colour).index($)",
    ),
    options("int enum", tuple(kit.Level), "$; $.value; ($ + 1); (2 if $ > 2 else 1); (2 if $ is Level.LOW else 1)"),
    options("int enum or int", (kit.Level.LOW, 1), "(2 if isinstance($, Level) else 1)"),
    options("str enum", tuple(kit.Mode), "len($); (2 if $ == 'bb' else 1); len($.value)"),
    options("flags", tuple(kit.Flags), "$.value; (2 if $ & Flags.A else 1)"),
    options(
        "range of the same items",
        (range(0, 3, 2), range(0, 4, 2)),
        "$.stop; (2 if $.stop == 3 else 1); len(str($.stop)) * $.stop",
    ),
    kind("range", lambda k: range(k + 2), "len($); sum($); $.stop; $[-1]; (3 in $); last($); len(list($))"),
    kind("slice", lambda k: slice(0, k + 1), "$.stop; len([1, 2, 3, 4, 5, 6, 7][$]); x[..., $].sum()"),
    kind("tuple", lambda k: (1, k), *SEQUENCE),
    kind("list", lambda k: [1, k], *SEQUENCE, "($ + [1])[1]; $.copy()[1]; (2 if $ == [1, 2] else 1)"),
    kind("longer list", lambda k: [1, *[2] * k], *(r for r in SEQUENCE if "[1]" not in r and "(1)" not in r)),
    kind("list of lists", lambda k: [[1], [0, k]], "$[1][1]; sum($[1]); sum(map(sum, $)); len(sorted($)[0])"),
    kind("nested tuple", lambda k: (0, (1, (k,))), "$[1][1][0]; sum($[1][1]); unpacked($[1][1]); first_of($[1][1])"),
    kind("tuple of strings", lambda k: ("a", "b" * (k + 1)), "len($[1]); len(''.join($)); sum(map(len, $))"),
    kind("deque", lambda k: collections.deque([1, k]), "$[1]; sum($); len($); last($); list($)[1]; looped($)"),
    kind("set", lambda k: {1, k + 2}, "sum($); (2 if 3 in $ else 1); max($); sorted($)[1]; len($); len($ | {3})"),
    kind(
        "frozenset",
        lambda k: frozenset({1, k + 2}),
        "sum($); (2 if 3 in $ else 1); sorted($)[1]; len($ - {3}); max($); (2 if $ == {1, 2} else 1)",
    ),
    makers(
        "order of a set",
        (lambda: set([0, 8]), lambda: set([8, 0])),
        "next(iter($)); list($)[0]; looped($); tuple($)[-1]; unpacked($); last($)",
    ),
    makers("order of a frozenset", (lambda: frozenset([0, 8]), lambda: frozenset([8, 0])), "first_of($); list($)[1]"),
    kind("set of strings", lambda k: {"a", f"n{k}"}, "(2 if 'n1' in $ else 1); len($ & {'n0', 'n1'})"),
    kind("set of objects", lambda k: {kit.Frozen(float(k))}, "first_of($).by; (Frozen(1.0) in $); list($)[0].by"),
    kind("set of equal objects", lambda k: {kit.AlwaysEqual(by=k)}, "first_of($).by; list($)[0].by"),
    kind("set of types", lambda k: {(1, 1.0, True)[k]}, "vary(first_of($)); vary(list($)[0])", variants=3),
    kind("dict", lambda k: {"k": float(k)}, *DICT),
    kind("dict with unread keys", lambda k: {"u": 5.0, "k": float(k)}, "$['k']; $.get('k'); sum($.values())"),
    kind(
        "other keys",
        lambda k: {f"k{k}": 1.0},
        "('k3' in $); int(list($)[0][1]); tried_key($); $.get('k0', 2); named(**$)",
    ),
    kind("another length", lambda k: dict.fromkeys(range(k + 1), 1), "len($); sum($); max($); sum($.values())"),
    makers(
        "order of a dict",
        (lambda: {"k": 1.0, "b": 2.0}, lambda: {"b": 2.0, "k": 1.0}),
        "next(iter($.values())); (2 if list($)[0] == 'k' else 1); list($.items())[0][1]; looped($.values()); "
        "(2 if first_of($) == 'k' else 1); unpacked($.values()); (2 if ''.join($) == 'kb' else 1); "
        "list({**$}.values())[0]",
    ),
    kind("int keys", lambda k: {1: float(k)}, "$[1]; $.get(1); sum($.values()); $[True]; $[1.0]; tried_key($, 1)"),
    makers(
        "type of a key",
        (lambda: {1: 1}, lambda: {1.0: 1}, lambda: {True: 1}),
        "vary(first_of($)); vary(list($)[0]); len(str(list($)[0])); vary(list($.items())[0][0])",
    ),
    kind("tuple keys", lambda k: {(1, "a"): float(k)}, "$[1, 'a']; first_of($.values())"),
    kind("enum keys", lambda k: {kit.Colour.RED: float(k)}, "$[Colour.RED]; first_of($.values())"),
    kind("dtype keys", lambda k: {torch.float32: float(k)}, "$[torch.float32]; $[x.dtype]"),
    kind(
        "nested dict",
        lambda k: {"a": [{"b": (float(k),)}]},
        "$['a'][0]['b'][0]; sum($['a'][0]['b']); sum($['a'][-1].get('b'))",
    ),
    kind("ordered dict", lambda k: collections.OrderedDict(k=float(k)), *DICT),
    kind("factory", lambda k: collections.defaultdict(kit.default(float(k))), "$.default_factory(); $['new']"),
    kind("defaultdict", lambda k: collections.defaultdict(int, k=float(k)), "$['k']; $.get('k'); sum($.values())"),
    kind("counter", lambda k: collections.Counter(k=k), "$['k']; $.total(); $.get('k'); sum($.values())"),
    kind("mapping proxy", lambda k: types.MappingProxyType({"k": float(k)}), "$['k']; $.get('k'); sum($.values())"),
    kind("mapping proxy's type", lambda k: types.MappingProxyType({"k": (1, 1.0)[k]}), "vary($['k'])", variants=2),
    kind("chain map", lambda k: collections.ChainMap({}, {"k": float(k)}), "$['k']; $.maps[1]['k']"),
    kind("user dict", lambda k: collections.UserDict(k=float(k)), "$['k']; $.data['k']"),
    kind("user list", lambda k: collections.UserList([1, k]), "$[1]; $.data[1]"),
    kind(
        "named tuple",
        lambda k: kit.Scale(float(k)),
        "$.by; $[0]; $._asdict()['by']; $._replace(other=2).by; unpacked($); sum($); spread(*$)",
    ),
    kind("dataclass", lambda k: kit.Point(float(k)), *DATACLASS, "vars($)['by']"),
    kind("frozen dataclass", lambda k: kit.Frozen(float(k)), *DATACLASS, "{Frozen(0.0): 1, Frozen(1.0): 2}.get($, 3)"),
    kind("slots dataclass", lambda k: kit.SlotPoint(float(k)), *BY),
    kind("uncompared field", lambda k: kit.Uncompared(float(k)), *DATACLASS[:-1]),
    kind("dataclass without eq", lambda k: kit.NeverEqual(float(k)), *DATACLASS[:-2]),
    kind(
        "dataclass or its subclass",
        lambda k: (kit.Point, kit.Grown)[k](1.0),
        "(2 if isinstance($, Grown) else 1); len(dataclasses.fields($)); (type($) is Point)",
        variants=2,
    ),
    kind("namespace", lambda k: types.SimpleNamespace(by=float(k)), *OBJECT),
    kind("object", lambda k: Box(by=float(k)), *OBJECT, "$.get(); $.scaled(2); (lambda f: f())($.get)"),
    kind("object, unread too", lambda k: Box(by=float(k), u=1.0), *BY),
    kind(
        "nested object",
        lambda k: Box(inner=Box(by=float(k))),
        "$.inner.by; functools.reduce(getattr, ('inner', 'by'), $); operator.attrgetter('inner.by')($); "
        "vars($.inner)['by']; $.inner.get()",
    ),
    kind(
        "object with containers",
        lambda k: Box(table=[{"k": (1, float(k))}]),
        "$.table[0]['k'][1]; last($.table[0]['k']); sum($.table[0].get('k'))",
    ),
    kind("object always equal", lambda k: kit.AlwaysEqual(by=float(k)), *OBJECT),
    kind(
        "missing attribute",
        deleted,
        "(2 if hasattr($, 'by') else 1); tried_attribute($); getattr($, 'by', 3); getattr($, 'by3', 3); "
        "('by' in vars($))",
        variants=2,
    ),
    kind(
        "object with operators",
        lambda k: kit.Sized(by=k + 1),
        "len($); (3 if $ else 1); (2 if 3 in $ else 1); $[1]; unpacked($); $(); ($ + 1); sum($)",
    ),
    kind("slots", lambda k: kit.Slotted(float(k)), "$.by; $.open; getattr($, 'open'); tried_attribute($, 'open')"),
    kind(
        "private attribute", lambda k: kit.Private(float(k)), "$.by; $.twice; getattr($, 'by'); vars($)['_Private__by']"
    ),
    kind(
        "__getattr__",
        lambda k: kit.Lazy(by=float(k)),
        "$.by; getattr($, 'by'); $.table['by']; getattr($, 'by3', 2) + $.by",
    ),
    kind("data descriptor", lambda k: kit.Described(float(k)), "$.by; $._by"),
    kind("descriptor", lambda k: kit.Described(float(k)), "$.more"),
    kind(
        "class attribute",
        lambda k: kit.subclass(float(k))(),
        "$.by; type($).by; $.read(); $.of_class(); getattr($, 'by')",
    ),
    kind("class", lambda k: kit.subclass(float(k)), "$.by; $.__dict__['by']; $.of_class()"),
    options(
        "types",
        (int, float, str),
        "(2 if $ is int else 1); float($(2.5)); (2 if issubclass($, int) else 1); (2 if $ in (int, str) else 1)",
    ),
    kind("module", lambda k: extra_module(float(k)), "$.by"),
    kind(
        "int with attribute",
        lambda k: kit.extra(kit.MyInt(1), float(k)),
        "$.extra; getattr($, 'extra'); vars($)['extra']",
    ),
    kind("float with attribute", lambda k: kit.extra(kit.MyFloat(1.0), float(k)), "$.extra; getattr($, 'extra')"),
    kind("int of a class", lambda k: kit.MyInt(k), "$; ($ + 1); int($)"),
    kind("float of a class", lambda k: kit.MyFloat(k), "$; ($ + 1); float($)"),
    kind("str with attribute", lambda k: kit.extra(kit.MyStr("a"), float(k)), "$.extra"),
    kind("tuple with attribute", lambda k: kit.extra(kit.MyTuple((1, 2)), float(k)), "$.extra; getattr($, 'extra')"),
    kind("tuple of a class", lambda k: kit.MyTuple((1, k)), "$[1]; sum($); last($)"),
    kind("list with attribute", lambda k: kit.extra(kit.MyList([1, 2]), float(k)), "$.extra"),
    kind("list of a class", lambda k: kit.MyList([1, k]), "$[1]; sum($); looped($)"),
    kind("dict with attribute", lambda k: kit.extra(kit.MyDict(k=1), float(k)), "$.extra; getattr($, 'extra')"),
    kind("dict of a class", lambda k: kit.MyDict(k=float(k)), "$['k']; $.get('k'); sum($.values())"),
    kind("ordered dict of a class", lambda k: kit.MyOrdered(k=float(k)), "$['k']; sum($.values()); $.get('k')"),
    kind("ordered dict with attribute", lambda k: kit.extra(kit.MyOrdered(k=1.0), float(k)), "$.extra"),
    kind("dict with its own reading", lambda k: kit.Upper(k=float(k)), "$['k']"),
    kind("set with attribute", lambda k: kit.extra(kit.MySet({1}), float(k)), "$.extra"),
    kind("default", lambda k: kit.default(float(k)), *CALL, "$.__defaults__[1]"),
    kind("keyword default", lambda k: kit.keyword_default(float(k)), *CALL, "$.__kwdefaults__['k']"),
    kind("closure", lambda k: kit.closure(float(k)), *CALL, "$.__closure__[0].cell_contents"),
    kind("closure in a closure", lambda k: kit.deep_closure(float(k)), *CALL),
    kind("list in a closure", lambda k: kit.list_closure(float(k)), *CALL),
    options(
        "code",
        kit.CODES,
        *CALL,
        "(2 if $ is code_1 else 1); (2 if $ == code_1 else 1); {code_0: 1}.get($, 2); int($.__name__[-1])",
    ),
    kind("code of one name", lambda k: kit.code_of(f"{k}.0"), *CALL),
    kind("attribute of a function", lambda k: kit.attributed(float(k)), "$.by; getattr($, 'by'); $() + $.by"),
    kind("wrapped function", lambda k: kit.wrapped(float(k)), "$(); $.__wrapped__()"),
    kind("partial", lambda k: functools.partial(kit.give, float(k)), *CALL, "$.args[0]; $.func($.args[0])"),
    kind("partial's keyword", lambda k: functools.partial(kit.give_keyword, k=float(k)), *CALL, "$.keywords['k']"),
    kind("partial's function", lambda k: functools.partial(kit.CODES[k], 1), "$()", variants=3),
    kind(
        "partial of a partial", lambda k: functools.partial(functools.partial(kit.give_keyword, k=float(k)), 1), "$()"
    ),
    kind("partial of a torch function", lambda k: functools.partial(torch.mul, float(k)), "$(y); $(x).sum()"),
    kind("partial of a list", lambda k: functools.partial(sum, [1, float(k)]), "$()"),
    kind("partial of an object", lambda k: functools.partial(kit.Box.get, Box(by=float(k))), "$()"),
    kind("bound method", lambda k: Box(by=float(k)).get, *CALL, "$.__self__.by"),
    kind("class method", lambda k: kit.subclass(float(k)).of_class, "$(); $.__self__.by"),
    kind("method of a container", lambda k: {"k": float(k)}.get, "$('k')"),
    kind("callable", lambda k: kit.Sized(by=k), "$(); $(1)"),
    options("built-in function", (abs, int, float), "$(-2.5)"),
    options("torch function", (torch.relu, torch.tanh, torch.cos, torch.neg), "$(y); $(y).sum()"),
    options("torch method", (torch.Tensor.relu, torch.Tensor.cos), "$(y)"),
    options("operator", (operator.add, operator.mul), "$(y, 3.0); $(2, 3)"),
    kind("list of functions", lambda k: [kit.default(float(k))], "$[0](); sum(f() for f in $)"),
    kind("dict of functions", lambda k: {"k": kit.closure(float(k))}, "$['k'](); $['k'](1)"),
    kind("cached function", lambda k: functools.lru_cache(kit.default(float(k))), "$()"),
    kind("numpy float", lambda k: np.float64(k), "torch.as_tensor($); $.ndim"),
    kind("numpy float32", lambda k: np.float32(k), "torch.as_tensor($)"),
    makers("numpy dtype", (lambda: np.dtype("float32"), lambda: np.dtype("int8")), "(2 if $ == np.float32 else 1)"),
    kind(
        "array",
        lambda k: np.array([float(k)] * 8, dtype=np.float32),
        "torch.from_numpy($); torch.as_tensor($); float($.shape[0])",
    ),
    kind("size", lambda k: torch.Size([k + 1, 2]), "$[0]; $.numel(); sum($); unpacked($); len($)"),
    kind("tensor", tensor, "$; $.sum(); ($ * 2); torch.matmul(y, torch.diag($))", tensors=True),
    kind("tensors in a list", lambda k: [tensor(0), tensor(k)], "$[1]; $[-1].sum(); sum($)", tensors=True),
    kind("tensors in a dict", lambda k: {"k": tensor(k)}, "$['k']; $.get('k'); first_of($.values())", tensors=True),
    kind("tensors in an object", lambda k: Box(by=tensor(k)), "$.by; $.get()", tensors=True),
    options("tensor or None", (None, tensor(2)), "(1 if $ is None else $)"),
    options("tensor or number", (2.0, tensor(2)), "($ + 1)"),
    kind("shape of a tensor", lambda k: torch.ones(k + 1), "$.shape[0]; $.numel(); $.sum(); len($)"),
    kind("dimensions of a tensor", lambda k: torch.ones((1,) * k), "$.dim(); len($.shape)"),
    kind(
        "dtype of a tensor",
        lambda k: torch.ones(8, dtype=(torch.float32, torch.float64)[k]),
        "(2 if $.dtype == torch.float64 else 1); ($ / 3).double().sum(); $.element_size()",
        variants=2,
    ),
    kind(
        "strides",
        lambda k: torch.ones(8, 8).t()[:, : 8 - k] if k else torch.ones(8, 8),
        "$.stride()[0]; (2 if $.is_contiguous() else 1); $.shape[1]",
        variants=3,
    ),
    kind(
        "requires_grad",
        lambda k: torch.ones(8, requires_grad=bool(k)),
        "(2 if $.requires_grad else 1); (2 if $.is_leaf else 1)",
        variants=2,
    ),
    kind(
        "parameter or tensor",
        lambda k: nn.Parameter(tensor(0), requires_grad=False) if k else tensor(0),
        "(2 if isinstance($, nn.Parameter) else 1)",
        variants=2,
    ),
    kind(
        "attribute of a parameter",
        lambda k: kit.extra(nn.Parameter(tensor(0), requires_grad=False), float(k)),
        "$.extra; getattr($, 'extra'); (2 if hasattr($, 'extra') else 1) * $.extra",
    ),
    kind("attribute of a tensor", lambda k: kit.extra(tensor(0), float(k)), "$.extra"),
    kind("weak reference", lambda k: kept(weakref.ref, Box(by=float(k))), "$().by"),
    kind("name object", lambda k: kit.Name(f"n{k}"), "attn(y, $)"),
    kind("iterator", lambda k: iter([float(k)] * 20), "next($)"),
    kind("generator expression's list", lambda k: tuple(float(v) for v in range(k + 1)), "len($); sum($); max($)"),
)


def extra_module(by: float) -> types.ModuleType:
    made = types.ModuleType("made")
    made.by = by  # type: ignore[attr-defined]
    return made


@dataclass(frozen=True)
class Place:
    """Where a layer keeps a value.  `put(layer, name, value, table)` puts it there; `table` is a global dict.

    own: the same place of an equal layer holds an equal value, so such layers may be copied.
    """

    name: str
    access: str
    put: Callable[[Any, str, Any, dict[Any, Any]], None]
    own: bool = True


def deep(layer: Any, name: str, value: Any, _: Any) -> None:
    if not hasattr(layer, "block"):
        layer.block = kit.Inner()
        layer.block.inner = kit.Inner()
    setattr(layer.block.inner, name, value)


def _set(wrap: Callable[[Any], Any]) -> Callable[..., None]:
    return lambda layer, name, value, _: setattr(layer, name, wrap(value))


# NAME is replaced by the value's name.
PLACES: tuple[Place, ...] = (
    Place("attribute", "@.NAME", _set(lambda v: v)),
    Place("attribute by getattr", "getattr(@, 'NAME')", _set(lambda v: v)),
    Place("attribute by a computed name", "getattr(@, '-NAME'[1:])", _set(lambda v: v)),
    Place("attribute by vars", "vars(@)['NAME']", _set(lambda v: v)),
    Place("attribute by __dict__", "@.__dict__['NAME']", _set(lambda v: v)),
    Place("attribute by attrgetter", "operator.attrgetter('NAME')(@)", _set(lambda v: v)),
    Place("attribute of a submodule", "@.lin.NAME", lambda s, name, v, _: setattr(s.lin, name, v)),
    Place("attribute of a deep submodule", "@.block.inner.NAME", deep),
    Place("submodule by name", "@.get_submodule('block').inner.NAME", deep),
    Place("deep by reduce", "functools.reduce(getattr, ('block', 'inner', 'NAME'), @)", deep),
    Place("object", "@.NAME.held", _set(lambda v: Box(held=v))),
    Place("object by vars", "vars(@.NAME)['held']", _set(lambda v: Box(held=v))),
    Place("namespace", "@.NAME.held", _set(lambda v: types.SimpleNamespace(held=v))),
    Place("slot", "@.NAME.open", _set(kit.Slotted)),
    Place("mangled slot", "@.NAME.by", _set(kit.Slotted)),
    Place("property", "@.NAME.by", _set(kit.Private)),
    Place("__getattr__", "@.NAME.held", _set(lambda v: kit.Lazy(held=v))),
    Place("frozen dataclass", "@.NAME.by", _set(kit.Frozen)),
    Place("dataclass", "@.NAME.by", _set(kit.Point)),
    Place("uncompared field", "@.NAME.by", _set(kit.Uncompared)),
    Place("equal object", "@.NAME.held", _set(lambda v: kit.AlwaysEqual(held=v))),
    Place("descriptor", "@.NAME.by", _set(kit.Described)),
    Place("class attribute", "@.NAME.by[0]", _set(lambda v: kit.subclass([v])()), own=False),
    Place("named tuple", "@.NAME.by", _set(kit.Scale)),
    Place("dict", "@.NAME['held']", _set(lambda v: {"held": v})),
    Place("dict by get", "@.NAME.get('held')", _set(lambda v: {"u": 1, "held": v})),
    Place("int key", "@.NAME[1]", _set(lambda v: {1: v})),
    Place("ordered dict", "@.NAME['held']", _set(lambda v: collections.OrderedDict(held=v))),
    Place("dict of a class", "@.NAME['held']", _set(lambda v: kit.MyDict(held=v))),
    Place("list", "@.NAME[0]", _set(lambda v: [v])),
    Place("tuple", "@.NAME[1]", _set(lambda v: (0, v))),
    Place("iteration", "first_of(@.NAME)", _set(lambda v: [v])),
    Place("unpacking", "last(@.NAME)", _set(lambda v: (0, v))),
    Place("nested containers", "@.NAME['a'][0]['b'][1]", _set(lambda v: {"a": [{"b": (0, v)}]})),
    Place("object in a list in an object", "@.NAME.held[0].held", _set(lambda v: Box(held=[Box(held=v)]))),
    Place("closure", "@.NAME()", _set(kit.closure)),
    Place("default", "@.NAME()", _set(kit.default)),
    Place("keyword default", "@.NAME()", _set(kit.keyword_default)),
    Place("partial", "@.NAME()", _set(lambda v: functools.partial(kit.give, v))),
    Place("partial's keyword", "@.NAME()", _set(lambda v: functools.partial(kit.give_keyword, k=v))),
    Place("bound method", "@.NAME()", _set(lambda v: Box(by=v).get)),
    Place("attribute of a parameter", "@.lin.weight.NAME", lambda s, name, v, _: setattr(s.lin.weight, name, v)),
    Place("global table by module", "TABLE_NAME[@.lin]", lambda s, name, v, t: t.__setitem__(s.lin, v), own=False),
    Place(
        "global table by parameter",
        "TABLE_NAME[@.lin.weight]",
        lambda s, name, v, t: t.__setitem__(s.lin.weight, v),
        own=False,
    ),
    Place("global table by name", "TABLE_NAME[@.name]", lambda s, name, v, t: t.__setitem__(s.name, v), own=False),
    Place("global table by layer", "TABLE_NAME[@]", lambda s, name, v, t: t.__setitem__(s, v), own=False),
    Place("global table by number", "TABLE_NAME[@.idx]", lambda s, name, v, t: t.__setitem__(s.idx, v), own=False),
    Place("argument", "a_NAME", _set(lambda v: v), own=False),
)
