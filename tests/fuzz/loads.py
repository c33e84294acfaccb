"""Changes between two starts of a decorated toy model: after which of them may kept code be loaded?

The first start is in one state and keeps its code.  A start in the same state must load it; one in another state must
give what eager mode gives there.  This module says what changes, and needs no vLLM; `start.py` is what a start runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests import process

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
    around: Callable[[Any], AbstractContextManager[None]] = contextlib.nullcontext
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


def variable_case(name: str, read: str, values: tuple[Any, Any] = ("2", "3"), helpers: str = "") -> Change:
    """A variable of the environment, TOY_ and a letter; None where it is not set."""
    found = re.search(r"TOY_\w", read + helpers)
    assert found is not None
    return Change(name, f"y = scale(y, {read})", values=values, helpers=helpers, around=variable(found.group()))


def torch_case(name: str, read: str, put: str, get: str, values: tuple[Any, Any] = (False, True)) -> Change:
    """A state of torch.  `get`: what it is; `put`: a statement that makes it v."""

    @contextlib.contextmanager
    def around(v: Any) -> Iterator[None]:
        import torch

        before = eval(get, {"torch": torch})
        exec(put, {"torch": torch, "v": eval(v, {"torch": torch}) if isinstance(v, str) else v})
        try:
            yield
        finally:
            exec(put, {"torch": torch, "v": before})

    return Change(name, f"y = scale(y, {read})", values=values, around=around)


def backend_case(name: str) -> Change:
    where = f"torch.backends.{name}"
    return torch_case(name, f"2.0 if {where} else 3.0", f"{where} = v", f"bool({where})")


def files_case(name: str, read: str, imports: str, base: str = "nn.Module", **files: str) -> Change:
    """Modules beside the layer's; V stands for v in their text."""
    texts = {f"{module}.py": text for module, text in files.items()}
    written = lambda v: {module: text.replace("V", str(v)) for module, text in texts.items()}  # noqa: E731
    return Change(name, f"y = scale(y, {read})", imports=imports, base=base, files=written)


def case(name: str, put: str, read: str, helpers: str = "", values: tuple[Any, Any] = (2.0, 3.0)) -> Change:
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
    case("number", "v", "s.a"),
    case("partial", "functools.partial(scale, k=v)", "1.0) + s.a(y", ""),
    case("partial's argument", "functools.partial(give, v)", "s.a()", "def give(v):\n    return v"),
    case(
        "partial of a partial",
        "functools.partial(functools.partial(give, v), 1)",
        "s.a()",
        "def give(v, w):\n    return v",
    ),
    case("closure", "closure(v)", "s.a()", CLOSURE),
    case("closure in a closure", "closure(closure(v))", "s.a()()", CLOSURE),
    case("lambda default", "lambda k=v: k", "s.a()"),
    case("keyword default", "made(v)", "s.a()", "def made(v):\n    def f(*, k=v):\n        return k\n    return f"),
    case("object", "Box(v)", "s.a.by", BOX),
    case("object in an object", "Box(Box(v))", "s.a.by.by", BOX),
    case("bound method", "Box(v).get", "s.a()", BOX),
    case("namespace", "types.SimpleNamespace(by=v)", "s.a.by"),
    case("int-keyed dict", "{1: v}", "s.a[1]"),
    case("tuple-keyed dict", "{(1, 'a'): v}", "s.a[1, 'a']"),
    case("nested dict", "{'a': [{'b': (v,)}]}", "s.a['a'][0]['b'][0]"),
    case("named tuple", "Pair(1.0, v)", "s.a.by", "class Pair(NamedTuple):\n    other: float\n    by: float"),
    case("enum member", "Colour(v)", "float(s.a.value)", ENUM, (2, 3)),
    case("enum member that is compared", "Colour(v)", "2.0 if s.a is Colour.RED else 4.0", ENUM, (2, 3)),
    case("dataclass", "Point(v)", "s.a.by", POINT.format("", "")),
    case("frozen dataclass", "Point(v)", "s.a.by", POINT.format("(frozen=True)", "")),
    case("uncompared field", "Point(v)", "s.a.by", POINT.format("", " = dataclasses.field(compare=False)")),
    case(
        "slots",
        "Slotted(v)",
        "s.a.by",
        "class Slotted:\n    __slots__ = ('by',)\n    def __init__(self, v):\n        self.by = v",
    ),
    case("private attribute", "Private(v)", "s.a.by", PRIVATE),
    case("zero and minus zero", "v", "2.0 + math.copysign(1, s.a)", values=(0.0, -0.0)),
    case("zero and minus zero in a tuple", "(1, v)", "2.0 + math.copysign(1, s.a[1])", values=(0.0, -0.0)),
    case("number or not a number", "v", "2.0 if s.a != s.a else 3.0", values=(1.0, float("nan"))),
    case("bool or int", "v", "2.0 if isinstance(s.a, bool) else 3.0", values=(True, 1)),
    case("int or float in a list", "[v]", "2.0 if isinstance(s.a[0], int) else 3.0", values=(1, 1.0)),
    case("str that starts with a slash", "v", "float(len(s.a))", values=("/a", "/abc")),
    case("str", "v", "2.0 if s.a.endswith('3') else 3.0", values=("n2", "n3")),
    case("bytes", "v", "float(s.a[0])", values=(b"\x02", b"\x03")),
    case("dtype", "v", "float(s.a.itemsize)", values=("float32", "float64")),
    case("order of a set", "set(v)", "float(1 + next(iter(s.a)))", values=([0, 8], [8, 0])),
    case("order of a dict", "dict.fromkeys(v, 1)", "float(1 + next(iter(s.a)))", values=([0, 8], [8, 0])),
    case("range", "range(0, v, 2)", "float(s.a.stop)", values=(3, 4)),
    case("deque", "collections.deque([1, v])", "s.a[1]"),
    case("ordered dict", "collections.OrderedDict(k=v)", "s.a['k']"),
    case("mapping proxy", "types.MappingProxyType({'k': v})", "s.a['k']"),
    case(
        "attribute of a float",
        "made(v)",
        "s.a.extra",
        "class Number(float):\n    pass\ndef made(v):\n    n = Number(1.0)\n    n.extra = v\n    return n",
    ),
    case("class attribute", "type('Sub', (), {'by': v})()", "s.a.by"),
    case("__getattr__", "Lazy(v)", "s.a.by", LAZY),
    case(
        "callable",
        "Call(v)",
        "s.a()",
        "class Call:\n    def __init__(self, v):\n        self.by = v\n    def __call__(self):\n        return self.by",
    ),
    case("kind of function", "torch.sin if v == 2.0 else torch.cos", "1.0) + s.a(y"),
    case(
        "class made by a function",
        "made(v)()",
        "s.a.get()",
        "def made(v):\n    class Made:\n        def get(self):\n            return v\n    return Made",
    ),
)

GLOBAL = "def give():\n    return NUMBER"
BY = "y = scale(y, s.by)"
METHOD, FUNCTION, OTHER = "def by(self):\n    return 2.0", "def by():\n    return 2.0", "def other():\n    return 3.0"
TRIPLES = "def other(self, y):\n    return scale(y, 3.0)"


def switched(name: str, read: str, then: str, helpers: str = "", attributes: str = "", **more: Any) -> Change:
    """`then` is done in the second state only."""
    return Change(
        name, read, then=f"if v: {then}", values=(False, True), helpers=helpers, attributes=attributes, **more
    )


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
    variable_case("variable by index", "float(os.environ['TOY_A'])"),
    variable_case("variable by getenv", "float(os.getenv('TOY_B', '2'))"),
    variable_case("variable that was not set", "float(os.environ.get('TOY_C', '2'))", (None, "3")),
    variable_case("variable that is no longer set", "float(os.environ.get('TOY_D', '2'))", ("3", None)),
    variable_case("whether a variable is set", "2.0 if 'TOY_E' in os.environ else 3.0", ("1", None)),
    variable_case("variable in a helper", "wanted()", helpers="def wanted():\n    return float(os.environ['TOY_F'])"),
    variable_case("global from a variable", "NUMBER", helpers="NUMBER = float(os.environ['TOY_G'])"),
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
    # Replaced in memory, as another plugin does it.
    switched("method of a class", "y = s.more(y)", "Layer.more = other", TRIPLES, "def more(self, y):\n    return y"),
    switched(
        "forward of a class", "", "Layer.forward = other", "def other(self, x):\n    return scale(self.lin(x), 3.0)"
    ),
    switched("property", BY, "Layer.by = property(lambda self: 3.0)", "", f"@property\n{METHOD}"),
    switched(
        "static method", f"{BY[:-1]}())", "Layer.by = staticmethod(lambda: 3.0)", "", f"@staticmethod\n{FUNCTION}"
    ),
    Change(
        "function of the module",
        "y = scale(y, by())",
        then="global by\nif v: by = lambda: 3.0",
        values=(False, True),
        helpers=FUNCTION,
    ),
    switched(
        "function in a registry",
        "y = scale(y, REGISTRY['by']())",
        "REGISTRY['by'] = other",
        f"{FUNCTION}\n{OTHER}\nREGISTRY = {{'by': by}}",
    ),
    switched(
        "function of another module",
        "y = scale(y, toy_other.by())",
        "toy_other.by = lambda: 3.0",
        imports="import toy_other",
        files=lambda v: {"toy_other.py": f"{FUNCTION}\n"},
    ),
    switched(
        "method of another module",
        "y = scale(y, toy_methods.Reader().by())",
        "toy_methods.Reader.by = lambda self: 3.0",
        imports="import toy_methods",
        files=lambda v: {"toy_methods.py": "class Reader:\n    def by(self):\n        return 2.0\n"},
    ),
    switched(
        "code of a function, set later", "y = scale(y, by())", "by.__code__ = other.__code__", f"{FUNCTION}\n{OTHER}"
    ),
    Change(
        "default of a function, set later",
        "y = scale(y, by())",
        then="by.__defaults__ = (v,)",
        helpers="def by(k=1.0):\n    return k",
    ),
    Change("function with an attribute", "y = scale(y, by.k)", then="by.k = v", helpers="def by():\n    return 2.0"),
    Change(
        "forward of torch's module",
        values=(False, True),
        around=lambda v: mock.patch("torch.nn.Linear.forward", tripled) if v else contextlib.nullcontext(),
    ),
    Change(
        "function of torch",
        "y = nn.functional.silu(y)",
        values=(False, True),
        around=lambda v: mock.patch("torch.nn.functional.silu", tripled_silu) if v else contextlib.nullcontext(),
    ),
    # Files.
    files_case(
        "constant of a base class in another module",
        "s.by",
        "from toy_base import Base",
        "Base",
        toy_base="from torch import nn\nclass Base(nn.Module):\n    by = V\n",
    ),
    files_case(
        "method of a base class in another module",
        "s.by()",
        "from toy_parent import Parent",
        "Parent",
        toy_parent="from torch import nn\nclass Parent(nn.Module):\n    def by(self):\n        return V\n",
    ),
    files_case("constant imported by name", "NUMBER", "from toy_constant import NUMBER", toy_constant="NUMBER = V\n"),
    files_case("constant by a module's attribute", "toy_at.NUMBER", "import toy_at", toy_at="NUMBER = V\n"),
    files_case(
        "constant of a constant",
        "toy_second.NUMBER",
        "import toy_second",
        toy_second="from toy_third import NUMBER\n",
        toy_third="NUMBER = V\n",
    ),
    files_case("dict in another file", "TABLE['k']", "from toy_table import TABLE", toy_table="TABLE = {'k': V}\n"),
    files_case("imported function", "by()", "from toy_function import by", toy_function="def by():\n    return V\n"),
    files_case(
        "keyword default of an imported function",
        "by()",
        "from toy_default import by",
        toy_default="def by(*, k=V):\n    return k\n",
    ),
    files_case(
        "default that another module computes",
        "by()",
        "from toy_computed import by",
        toy_computed="from toy_number import NUMBER\ndef by(k=NUMBER):\n    return k\n",
        toy_number="NUMBER = V\n",
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
        "global of a cell", "y = scale(y, NUMBER)", then="global NUMBER; NUMBER = v", helpers="NUMBER = 1.0", cell=True
    ),
    Change("function of a file, made by exec", "y = scale(y, by())", then="exec(f'def by(): return {v}', globals())"),
    # Torch.
    *(backend_case(name) for name in ("cudnn.allow_tf32", "cudnn.deterministic", "mkldnn.deterministic")),
    backend_case("mkldnn.enabled"),
    torch_case(
        "default dtype",
        "float(torch.get_default_dtype().itemsize)",
        "torch.set_default_dtype(v)",
        "torch.get_default_dtype()",
        ("torch.float32", "torch.float64"),
    ),
    torch_case(
        "deterministic algorithms",
        "2.0 if torch.are_deterministic_algorithms_enabled() else 3.0",
        "torch.use_deterministic_algorithms(v)",
        "torch.are_deterministic_algorithms_enabled()",
    ),
    torch_case(
        "gradients", "2.0 if torch.is_grad_enabled() else 3.0", "torch.set_grad_enabled(v)", "torch.is_grad_enabled()"
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


Starts = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def starts(folder: Path, names: Sequence[str] = ()) -> Starts:
    """What a first start in the first state gives, another one in that state, and one in the other state: each in a
    process of its own."""
    return tuple(_start(folder, state, names) for state in (0, 0, 1))  # type: ignore[return-value]


def _start(folder: Path, state: int, names: Sequence[str]) -> dict[str, Any]:
    outcome = process.run(START, str(state), *names, folder=folder, fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    value: dict[str, Any] = outcome.value
    return value


def wrong(three: Starts, name: str) -> list[str]:
    """What does not hold of a change, in words."""
    first, again, other = (start[name] for start in three)
    change, found = CHANGES[name], []
    for start, which in ((first, "first start"), (again, "same state"), (other, "other state")):
        if "error" in start:
            return [f"{which}: {start['error']}"]
        off = max(start["off"], start["again"])
        if not off <= 1e-4:
            found.append(f"{which}: off by {off:.2g} ({'loaded' if start['loaded'] else 'compiled'})")
    if not first["kept"]:
        found.append("first start: nothing kept")
    elif not again["loaded"]:
        found.append("same state: not loaded")
    if change.loads and first["kept"] and not other["loaded"]:
        found.append("other state: not loaded")
    if not change.loads and first["expected"] == other["expected"]:
        found.append("the change changes nothing")
    return found


def main(arguments: list[str]) -> int:
    """Make the three starts for all changes, or for the named ones, and print what did not hold."""
    with tempfile.TemporaryDirectory() as folder:
        three = starts(Path(folder), arguments)
    bad = 0
    for name in arguments or CHANGES:
        if why := wrong(three, name):
            bad += 1
            print(f"[{name}] {'; '.join(why)}")
    changed = [n for n in (arguments or CHANGES) if not CHANGES[n].loads]
    print(
        f"loads: {len(changed)} changes, {len(arguments or CHANGES) - len(changed)} that must load; {bad} do not hold"
    )
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
