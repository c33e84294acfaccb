"""Changes between two starts of a decorated toy model: after which of them may kept code be loaded?

The first start is in one state and keeps its code.  A start in the same state must load it; one in another state must
give what eager mode gives there.  `start.py` makes the starts; this module says what changes, and needs no vLLM.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULE = """\
import collections, dataclasses, enum, functools, json, math, os, sys, types
from typing import NamedTuple
import numpy as np
import torch
from torch import nn
from tests import toys
from tests.fuzz.start import scale
{imports}
{helpers}

class Layer({base}):
    {attributes}
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(toys.SIZE, toys.SIZE)

    def forward(self, x):
        s = self
        y = s.lin(x)
        {read}
        return y

@toys.support_torch_compile
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self
        for layer in self.layers:
            x = layer(x)
        {model}
        return x

def prepare(model, v):
    for s in model.layers:
        {prepare}
        pass
    m = model
    {then}
    return model
"""


@contextlib.contextmanager
def nothing(v: Any) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Change:
    """`values`: v in the first state and in the other one.

    read: lines of a layer that use `s` and `y`; prepare: what gives layer `s` its state, then: what is done with the
    model `m`, both with v.  around: the state of the process.  files(v): other modules, written before each start.
    edited(v): text of the module itself.  cell: it is a notebook's, without a file.  loads: after the change, kept code
    must be loaded.
    """

    name: str
    read: str = ""
    prepare: str = ""
    then: str = ""
    values: tuple[Any, Any] = (2.0, 3.0)
    helpers: str = ""
    imports: str = ""
    attributes: str = ""
    base: str = "nn.Module"
    model: str = ""
    around: Callable[[Any], AbstractContextManager[None]] = nothing
    files: Callable[[Any], dict[str, str]] = field(default=lambda v: {})
    edited: Callable[[Any, str], str] = field(default=lambda v, text: text)
    loads: bool = False
    cell: bool = False

    @property
    def module(self) -> str:
        return "model_" + "".join(c if c.isalnum() else "_" for c in self.name.lower())

    def text(self, v: Any) -> str:
        parts = {name: textwrap.dedent(getattr(self, name)).strip() for name in ("imports", "helpers", "base")}
        for name, indent in (("read", 8), ("prepare", 8), ("then", 4), ("model", 8), ("attributes", 4)):
            lines = textwrap.dedent(getattr(self, name)).strip() or "pass"
            parts[name] = lines.replace("\n", "\n" + " " * indent)
        return self.edited(v, MODULE.format(**parts))


def variable(name: str) -> Callable[[Any], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def around(v: Any) -> Iterator[None]:
        if v is not None:
            os.environ[name] = v
        try:
            yield
        finally:
            os.environ.pop(name, None)

    return around


def torch_state(get: str, put: str) -> Callable[[Any], AbstractContextManager[None]]:
    """`get`: an expression of what torch has now; `put`: a statement that sets it to v."""

    @contextlib.contextmanager
    def around(v: Any) -> Iterator[None]:
        import torch

        before = eval(get, {"torch": torch})
        exec(put, {"torch": torch, "v": v})
        try:
            yield
        finally:
            exec(put, {"torch": torch, "v": before})

    return around


def flag(name: str) -> Callable[[Any], AbstractContextManager[None]]:
    return torch_state(f"bool(torch.backends.{name})", f"torch.backends.{name} = v")


@contextlib.contextmanager
def replaced(target: str, by: Any) -> Iterator[None]:
    """As another plugin does it: `module:attribute.attribute` is replaced in memory."""
    import importlib

    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    before = owner.__dict__[name]
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def of_layer(name: str, put: str, read: str, helpers: str = "", values: tuple[Any, Any] = (2.0, 3.0)) -> Change:
    """A layer's attribute `a`."""
    return Change(name, read=f"y = scale(y, {read})", prepare=f"s.a = {put}", helpers=helpers, values=values)


CLOSURE = "def closure(v):\n    return lambda: v"
BOX = "class Box:\n    def __init__(self, v):\n        self.by = v\n    def get(self):\n        return self.by"
POINT = "@dataclasses.dataclass{}\nclass Point:\n    by: float{}\n    other: float = 1.0"
ENUM = "class Colour(enum.Enum):\n    RED = 2\n    BLUE = 3"
PRIVATE = """
class Private:
    def __init__(self, v):
        self.__by = v
    @property
    def by(self):
        return self.__by
"""
LAZY = """
class Lazy:
    def __init__(self, v):
        self.table = {'by': v}
    def __getattr__(self, name):
        return self.__dict__['table'][name]
"""
TIMES = """
from tests.fuzz.start import scale
def times(f):
    return lambda s, y: scale(f(s, y), NUMBER)
"""

OF_LAYERS = (
    of_layer("number", "v", "s.a"),
    of_layer("partial", "functools.partial(scale, k=v)", "1.0) + s.a(y", ""),
    of_layer("partial's argument", "functools.partial(give, v)", "s.a()", "def give(v):\n    return v"),
    of_layer(
        "partial of a partial",
        "functools.partial(functools.partial(give, v), 1)",
        "s.a()",
        "def give(v, w):\n    return v",
    ),
    of_layer("closure", "closure(v)", "s.a()", CLOSURE),
    of_layer("closure in a closure", "closure(closure(v))", "s.a()()", CLOSURE),
    of_layer("lambda default", "lambda k=v: k", "s.a()"),
    of_layer("keyword default", "made(v)", "s.a()", "def made(v):\n    def f(*, k=v):\n        return k\n    return f"),
    of_layer("object", "Box(v)", "s.a.by", BOX),
    of_layer("object in an object", "Box(Box(v))", "s.a.by.by", BOX),
    of_layer("bound method", "Box(v).get", "s.a()", BOX),
    of_layer("namespace", "types.SimpleNamespace(by=v)", "s.a.by"),
    of_layer("int-keyed dict", "{1: v}", "s.a[1]"),
    of_layer("tuple-keyed dict", "{(1, 'a'): v}", "s.a[1, 'a']"),
    of_layer("nested dict", "{'a': [{'b': (v,)}]}", "s.a['a'][0]['b'][0]"),
    of_layer("named tuple", "Pair(1.0, v)", "s.a.by", "class Pair(NamedTuple):\n    other: float\n    by: float"),
    of_layer("enum member", "Colour(v)", "float(s.a.value)", ENUM, (2, 3)),
    of_layer("enum member that is compared", "Colour(v)", "2.0 if s.a is Colour.RED else 4.0", ENUM, (2, 3)),
    of_layer("dataclass", "Point(v)", "s.a.by", POINT.format("", "")),
    of_layer("frozen dataclass", "Point(v)", "s.a.by", POINT.format("(frozen=True)", "")),
    of_layer("uncompared field", "Point(v)", "s.a.by", POINT.format("", " = dataclasses.field(compare=False)")),
    of_layer(
        "slots",
        "Slotted(v)",
        "s.a.by",
        "class Slotted:\n    __slots__ = ('by',)\n    def __init__(self, v):\n        self.by = v",
    ),
    of_layer(
        "private attribute",
        "Private(v)",
        "s.a.by",
        PRIVATE,
    ),
    of_layer("zero and minus zero", "v", "2.0 + math.copysign(1, s.a)", values=(0.0, -0.0)),
    of_layer("zero and minus zero in a tuple", "(1, v)", "2.0 + math.copysign(1, s.a[1])", values=(0.0, -0.0)),
    of_layer("number or not a number", "v", "2.0 if s.a != s.a else 3.0", values=(1.0, float("nan"))),
    of_layer("bool or int", "v", "2.0 if isinstance(s.a, bool) else 3.0", values=(True, 1)),
    of_layer("int or float in a list", "[v]", "2.0 if isinstance(s.a[0], int) else 3.0", values=(1, 1.0)),
    of_layer("str that starts with a slash", "v", "float(len(s.a))", values=("/a", "/abc")),
    of_layer("str", "v", "2.0 if s.a.endswith('3') else 3.0", values=("n2", "n3")),
    of_layer("bytes", "v", "float(s.a[0])", values=(b"\x02", b"\x03")),
    of_layer("dtype", "v", "float(s.a.itemsize)", values=("float32", "float64")),
    of_layer("order of a set", "set(v)", "float(1 + next(iter(s.a)))", values=([0, 8], [8, 0])),
    of_layer("order of a dict", "dict.fromkeys(v, 1)", "float(1 + next(iter(s.a)))", values=([0, 8], [8, 0])),
    of_layer("range", "range(0, v, 2)", "float(s.a.stop)", values=(3, 4)),
    of_layer("deque", "collections.deque([1, v])", "s.a[1]"),
    of_layer("ordered dict", "collections.OrderedDict(k=v)", "s.a['k']"),
    of_layer("mapping proxy", "types.MappingProxyType({'k': v})", "s.a['k']"),
    of_layer(
        "attribute of a float",
        "made(v)",
        "s.a.extra",
        "class Number(float):\n    pass\ndef made(v):\n    n = Number(1.0)\n    n.extra = v\n    return n",
    ),
    of_layer("class attribute", "type('Sub', (), {'by': v})()", "s.a.by"),
    of_layer(
        "__getattr__",
        "Lazy(v)",
        "s.a.by",
        LAZY,
    ),
    of_layer(
        "callable",
        "Call(v)",
        "s.a()",
        "class Call:\n    def __init__(self, v):\n        self.by = v\n    def __call__(self):\n        return self.by",
    ),
    of_layer("kind of function", "torch.sin if v == 2.0 else torch.cos", "1.0) + s.a(y"),
    of_layer(
        "class made by a function",
        "made(v)()",
        "s.a.get()",
        "def made(v):\n    class Made:\n        def get(self):\n            return v\n    return Made",
    ),
)

GLOBAL = "def give():\n    return NUMBER"
OTHERS = (
    Change("attribute of a parameter", "y = scale(y, s.lin.weight.by)", "s.lin.weight.by = v"),
    Change("attribute of a submodule", "y = scale(y, s.lin.by)", "s.lin.by = v"),
    Change("numpy scalar", "y = y * float(s.a)", "s.a = np.float32(v)"),
    Change("attribute of the model", model="x = scale(x, m.by)", then="m.by = v"),
    Change("object of the model", model="x = scale(x, m.by.by)", then="m.by = types.SimpleNamespace(by=v)"),
    Change("tensor that is no buffer", "y = y * s.a", "s.a = torch.full((toys.SIZE,), v)"),
    Change("tensor in a closure", "y = y * s.a()", "s.a = closure(torch.full((toys.SIZE,), v))", helpers=CLOSURE),
    Change(
        "shape of a buffer", "y = scale(y, float(s.a.shape[0]))", "s.register_buffer('a', torch.ones(v))", values=(2, 3)
    ),
    Change("kind of activation", "y = s.a(y)", "s.a = nn.Tanh() if v == 2.0 else nn.ReLU()"),
    Change("slope of an activation", "y = s.a(y)", "s.a = nn.LeakyReLU(v / 10)"),
    Change("eps of a norm", "y = s.a(y)", "s.a = nn.LayerNorm(toys.SIZE, eps=v)"),
    Change("number of layers", then="m.layers = m.layers[:v]", values=(2, 3)),
    Change("a layer's bias", then="m.layers[1].lin = nn.Linear(toys.SIZE, toys.SIZE, bias=v)", values=(True, False)),
    Change("tied weights", then="if v: m.layers[1].lin = m.layers[0].lin", values=(False, True)),
    Change(
        "hook",
        then="for s in m.layers: s.register_forward_hook(made(v))",
        helpers="def made(v):\n    return lambda s, a, o: scale(o, v)",
    ),
    Change(
        "hook inside",
        then="for s in m.layers: s.lin.register_forward_hook(made(v))",
        helpers="def made(v):\n    return lambda s, a, o: scale(o, v)",
    ),
    Change(
        "forward of an instance",
        then="for s in m.layers: s.lin.forward = made(s.lin, v)",
        helpers="def made(lin, v):\n    return lambda x: scale(nn.functional.linear(x, lin.weight), v)",
    ),
    Change(
        "class of a submodule",
        then="if v: m.layers[1].lin.__class__ = Other",
        values=(False, True),
        helpers="class Other(nn.Linear):\n    def forward(self, x):\n        return scale(super().forward(x), 3.0)",
    ),
    # The environment.
    Change(
        "variable by index", "y = scale(y, float(os.environ['TOY_A']))", values=("2", "3"), around=variable("TOY_A")
    ),
    Change(
        "variable by getenv",
        "y = scale(y, float(os.getenv('TOY_B', '2')))",
        values=("2", "3"),
        around=variable("TOY_B"),
    ),
    Change(
        "variable that was not set",
        "y = scale(y, float(os.environ.get('TOY_C', '2')))",
        values=(None, "3"),
        around=variable("TOY_C"),
    ),
    Change(
        "variable that is no longer set",
        "y = scale(y, float(os.environ.get('TOY_D', '2')))",
        values=("3", None),
        around=variable("TOY_D"),
    ),
    Change(
        "whether a variable is set",
        "y = scale(y, 2.0 if 'TOY_E' in os.environ else 3.0)",
        values=("1", None),
        around=variable("TOY_E"),
    ),
    Change(
        "variable in a helper",
        "y = scale(y, wanted())",
        values=("2", "3"),
        around=variable("TOY_F"),
        helpers="def wanted():\n    return float(os.environ['TOY_F'])",
    ),
    Change(
        "global from a variable",
        "y = scale(y, NUMBER)",
        values=("2", "3"),
        around=variable("TOY_G"),
        helpers="NUMBER = float(os.environ['TOY_G'])",
    ),
    # Globals.
    Change("global", "y = scale(y, NUMBER)", then="global NUMBER; NUMBER = v", helpers="NUMBER = 1.0"),
    Change(
        "global in a helper",
        "y = scale(y, give())",
        then="global NUMBER; NUMBER = v",
        helpers=f"NUMBER = 1.0\n{GLOBAL}",
    ),
    Change("global dict", "y = scale(y, TABLE['k'])", then="TABLE['k'] = v", helpers="TABLE = {}"),
    Change("global list", "y = scale(y, sum(TABLE))", then="TABLE.append(v)", helpers="TABLE = []"),
    Change(
        "global object", "y = scale(y, OBJECT.by)", then="OBJECT.by = v", helpers="OBJECT = types.SimpleNamespace()"
    ),
    Change(
        "cached helper",
        "y = scale(y, give())",
        then="global NUMBER; NUMBER = v",
        helpers=f"NUMBER = 1.0\n@functools.lru_cache\n{GLOBAL}",
    ),
    Change("attribute of a class, set later", "y = scale(y, s.by)", then="Layer.by = v"),
    # Replaced in memory.
    Change(
        "method of a class",
        "y = s.more(y)",
        then="if v: Layer.more = other",
        values=(False, True),
        attributes="def more(self, y):\n    return y",
        helpers="def other(self, y):\n    return scale(y, 3.0)",
    ),
    Change(
        "forward of a class",
        then="if v: Layer.forward = other",
        values=(False, True),
        helpers="def other(self, x):\n    return scale(self.lin(x), 3.0)",
    ),
    Change(
        "property",
        "y = scale(y, s.by)",
        then="if v: Layer.by = property(lambda self: 3.0)",
        values=(False, True),
        attributes="@property\ndef by(self):\n    return 2.0",
    ),
    Change(
        "static method",
        "y = scale(y, s.by())",
        then="if v: Layer.by = staticmethod(lambda: 3.0)",
        values=(False, True),
        attributes="@staticmethod\ndef by():\n    return 2.0",
    ),
    Change(
        "function of the module",
        "y = scale(y, by())",
        then="global by\nif v: by = lambda: 3.0",
        values=(False, True),
        helpers="def by():\n    return 2.0",
    ),
    Change(
        "function in a registry",
        "y = scale(y, REGISTRY['by']())",
        then="if v: REGISTRY['by'] = other",
        values=(False, True),
        helpers="def by():\n    return 2.0\ndef other():\n    return 3.0\nREGISTRY = {'by': by}",
    ),
    Change(
        "function of another module",
        "y = scale(y, toy_other.by())",
        imports="import toy_other",
        values=(False, True),
        files=lambda v: {"toy_other.py": "def by():\n    return 2.0\n"},
        then="if v: toy_other.by = lambda: 3.0",
    ),
    Change(
        "method of another module",
        "y = scale(y, toy_methods.Reader().by())",
        imports="import toy_methods",
        values=(False, True),
        files=lambda v: {"toy_methods.py": "class Reader:\n    def by(self):\n        return 2.0\n"},
        then="if v: toy_methods.Reader.by = lambda self: 3.0",
    ),
    Change(
        "default of a function, set later",
        "y = scale(y, by())",
        then="by.__defaults__ = (v,)",
        helpers="def by(k=1.0):\n    return k",
    ),
    Change(
        "code of a function, set later",
        "y = scale(y, by())",
        then="if v: by.__code__ = other.__code__",
        values=(False, True),
        helpers="def by():\n    return 2.0\ndef other():\n    return 3.0",
    ),
    Change("function with an attribute", "y = scale(y, by.k)", then="by.k = v", helpers="def by():\n    return 2.0"),
    Change(
        "forward of torch's module",
        values=(False, True),
        around=lambda v: replaced("torch.nn:Linear.forward", tripled) if v else nothing(v),
    ),
    Change(
        "function of torch",
        "y = nn.functional.silu(y)",
        values=(False, True),
        around=lambda v: replaced("torch.nn.functional:silu", tripled_silu) if v else nothing(v),
    ),
    # Files.
    Change(
        "constant of a base class in another module",
        "y = scale(y, s.by)",
        imports="from toy_base import Base",
        base="Base",
        files=lambda v: {"toy_base.py": f"from torch import nn\nclass Base(nn.Module):\n    by = {v}\n"},
    ),
    Change(
        "constant imported by name",
        "y = scale(y, NUMBER)",
        imports="from toy_constant import NUMBER",
        files=lambda v: {"toy_constant.py": f"NUMBER = {v}\n"},
    ),
    Change(
        "constant by a module's attribute",
        "y = scale(y, toy_attribute.NUMBER)",
        imports="import toy_attribute",
        files=lambda v: {"toy_attribute.py": f"NUMBER = {v}\n"},
    ),
    Change(
        "constant of a constant",
        "y = scale(y, toy_second.NUMBER)",
        imports="import toy_second",
        files=lambda v: {"toy_second.py": "from toy_third import NUMBER\n", "toy_third.py": f"NUMBER = {v}\n"},
    ),
    Change(
        "dict in another file",
        "y = scale(y, TABLE['k'])",
        imports="from toy_table import TABLE",
        files=lambda v: {"toy_table.py": f"TABLE = {{'k': {v}}}\n"},
    ),
    Change(
        "keyword default of an imported function",
        "y = scale(y, by())",
        imports="from toy_default import by",
        files=lambda v: {"toy_default.py": f"def by(*, k={v}):\n    return k\n"},
    ),
    Change(
        "default that another module computes",
        "y = scale(y, by())",
        imports="from toy_computed import by",
        files=lambda v: {
            "toy_computed.py": "from toy_number import NUMBER\ndef by(k=NUMBER):\n    return k\n",
            "toy_number.py": f"NUMBER = {v}\n",
        },
    ),
    Change(
        "imported function",
        "y = scale(y, by())",
        imports="from toy_function import by",
        files=lambda v: {"toy_function.py": f"def by():\n    return {v}\n"},
    ),
    Change(
        "method of a base class in another module",
        "y = scale(y, s.by())",
        imports="from toy_parent import Parent",
        base="Parent",
        files=lambda v: {
            "toy_parent.py": f"from torch import nn\nclass Parent(nn.Module):\n    def by(self):\n        return {v}\n"
        },
    ),
    Change(
        "decorator in another module",
        "y = s.more(y)",
        imports="from toy_decorator import times",
        attributes="@times\ndef more(self, y):\n    return y",
        files=lambda v: {"toy_decorator.py": TIMES.replace("NUMBER", str(v))},
    ),
    Change("the layer's code", "y = scale(y, 2.0)", edited=lambda v, text: text.replace("2.0", str(v))),
    Change("the model's code", model="x = scale(x, 2.0)", edited=lambda v, text: text.replace("2.0", str(v))),
    Change(
        "a file that the constructor reads",
        "y = scale(y, s.a)",
        "s.a = json.load(open('toy_side.json'))['by']",
        files=lambda v: {"toy_side.json": f'{{"by": {v}}}'},
    ),
    Change(
        "a table that the constructor reads",
        "y = scale(y, s.a[0]['by'])",
        "s.a = json.load(open('toy_rows.json'))",
        files=lambda v: {"toy_rows.json": f'[{{"by": {v}}}]'},
    ),
    # Code without a file.
    Change("cell", "y = scale(y, 2.0)", edited=lambda v, text: text.replace("2.0", str(v)), cell=True),
    Change(
        "global of a cell",
        "y = scale(y, NUMBER)",
        then="global NUMBER; NUMBER = v",
        helpers="NUMBER = 1.0",
        cell=True,
    ),
    Change("function of a file, made by exec", "y = scale(y, by())", then="exec(f'def by(): return {v}', globals())"),
    # Torch.
    Change(
        "cudnn.allow_tf32",
        "y = scale(y, 2.0 if torch.backends.cudnn.allow_tf32 else 3.0)",
        values=(True, False),
        around=flag("cudnn.allow_tf32"),
    ),
    Change(
        "cudnn.deterministic",
        "y = scale(y, 2.0 if torch.backends.cudnn.deterministic else 3.0)",
        values=(False, True),
        around=flag("cudnn.deterministic"),
    ),
    Change(
        "mkldnn.deterministic",
        "y = scale(y, 2.0 if torch.backends.mkldnn.deterministic else 3.0)",
        values=(False, True),
        around=flag("mkldnn.deterministic"),
    ),
    Change(
        "mkldnn.enabled",
        "y = scale(y, 2.0 if torch.backends.mkldnn.enabled else 3.0)",
        values=(True, False),
        around=flag("mkldnn.enabled"),
    ),
    Change(
        "default dtype",
        "y = scale(y, float(torch.get_default_dtype().itemsize))",
        values=("torch.float32", "torch.float64"),
        around=torch_state(
            "torch.get_default_dtype()", "torch.set_default_dtype(eval(v) if isinstance(v, str) else v)"
        ),
    ),
    Change(
        "deterministic algorithms",
        "y = scale(y, 2.0 if torch.are_deterministic_algorithms_enabled() else 3.0)",
        values=(False, True),
        around=torch_state("torch.are_deterministic_algorithms_enabled()", "torch.use_deterministic_algorithms(v)"),
    ),
    Change(
        "gradients",
        "y = scale(y, 2.0 if torch.is_grad_enabled() else 3.0)",
        values=(False, True),
        around=torch_state("torch.is_grad_enabled()", "torch.set_grad_enabled(v)"),
    ),
)


def tripled(self: Any, x: Any) -> Any:
    import torch

    return torch.nn.functional.linear(x, self.weight, self.bias) * 3


def tripled_silu(x: Any) -> Any:
    return x * 3


PLAIN = "y = scale(y, s.a)"
LOADS = (
    Change("other weights", then="for p in m.parameters(): p.mul_(v)"),
    Change("values of a buffer", "y = y * s.a", "s.register_buffer('a', torch.full((toys.SIZE,), v))"),
    Change("unread attribute", PLAIN, "s.a, s.unread = 2.0, v"),
    Change("unread attribute of a submodule", PLAIN, "s.a, s.lin.unread = 2.0, v"),
    Change("unread attribute of the model", PLAIN, "s.a = 2.0", "m.unread = v"),
    Change(
        "unread attribute of an object",
        "y = scale(y, s.a.by)",
        "s.a = Box(); s.a.by, s.a.unread = 2.0, v",
        helpers="class Box:\n    pass",
    ),
    Change("unread object", PLAIN, "s.a, s.unread = 2.0, types.SimpleNamespace(by=[v])"),
    Change("unread function", PLAIN, "s.a, s.unread = 2.0, lambda k=v: k"),
    Change("unread path", PLAIN, "s.a, s.path = 2.0, v", values=("/models/a", "/models/b")),
    Change("unread global", PLAIN, "s.a = 2.0", "global NUMBER; NUMBER = v", helpers="NUMBER = 1.0"),
    Change("unread variable", PLAIN, "s.a = 2.0", values=("2", "3"), around=variable("TOY_UNREAD")),
    Change("unread file", PLAIN, "s.a = 2.0", files=lambda v: {"toy_unread.json": f"[{v}]"}),
    Change("unread module", PLAIN, "s.a = 2.0", files=lambda v: {"toy_unread.py": f"NUMBER = {v}\n"}),
    Change("time of a file", PLAIN, "s.a = 2.0", around=lambda v: touched("model_time_of_a_file.py", v)),
    Change(
        "folder of a file that is read",
        PLAIN,
        "s.a = json.load(open(v))['by']",
        values=("toy_one/a.json", "toy_two/b.json"),
        files=lambda v: {v: '{"by": 2.0}'},
    ),
    Change("equal objects", "y = scale(y, s.a.by['k'][0])", "s.a = types.SimpleNamespace(by={'k': (2.0,)})"),
    Change("equal functions", "y = scale(y, s.a())", "s.a = closure(2.0)", helpers=CLOSURE),
    Change("equal sets", "y = scale(y, float(sum(s.a)))", "s.a = set([0, 8])"),
    Change(
        "function replaced by an equal one",
        "y = scale(y, s.a())",
        "s.a = made()",
        helpers="def made():\n    return lambda: 2.0",
    ),
)

LOADS = tuple(Change(**{**vars(c), "loads": True}) for c in LOADS)
CHANGES = {c.name: c for c in (*OF_LAYERS, *OTHERS, *LOADS)}
assert len(CHANGES) == len(OF_LAYERS) + len(OTHERS) + len(LOADS)


@contextlib.contextmanager
def touched(name: str, v: Any) -> Iterator[None]:
    path = Path(name)
    if path.exists():
        os.utime(path, (1e9 + v, 1e9 + v))
    yield


def write(change: Change, v: Any) -> None:
    """Write the files of `change` into the current folder, those that are not as they should be."""
    texts = change.files(v)
    if not change.cell:
        texts = {**texts, f"{change.module}.py": change.text(v)}
    for name, text in texts.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


START = """
    import sys
    from tests.fuzz import start
    report(start.run(int(sys.argv[1]), sys.argv[2:]))
"""


def main(arguments: list[str]) -> int:
    """Make the three starts for all changes, or for the named ones, and print what did not hold."""
    from tests.fuzz import starts

    with tempfile.TemporaryDirectory() as folder:
        three = starts.starts(Path(folder), arguments)
    bad = 0
    for name in arguments or CHANGES:
        if why := starts.wrong(three, name):
            bad += 1
            print(f"[{name}] {'; '.join(why)}")
    changed = [n for n in (arguments or CHANGES) if not CHANGES[n].loads]
    print(
        f"loads: {len(changed)} changes, {len(arguments or CHANGES) - len(changed)} that must load; {bad} do not hold"
    )
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
