"""Layers by hand: those that were once copied though they differ, found by review and kept for ever; and traps."""

from __future__ import annotations

from typing import Any

from tests.fuzz.stacks import Feature, Stack, puts


def case(
    what: str, put: str, line: str, before: str = "", argument: str = "", *, copies: int | None = None, **more: Any
) -> Stack:
    """put: statements that prepare layer `s`, the i-th of model `m`.  line: what a layer computes; before: what the
    model does before it calls `layer`, the n-th.  argument: what `a` is in the call.  copies: how many have to be made,
    where that is said.  more: of `Feature`."""

    args = [("a", argument)] if argument else []
    feature = Feature(what, puts(put), lines=line, before=before, **{"args": args, **more})
    return Stack(what, [feature], copies)


KIND = "s.kind = torch.float32 if i % 2 else torch.bfloat16"
FUNCTION = "s.f = torch.sin if i % 2 else torch.cos"
VIEWS = """\
s.register_buffer('cache', torch.full((8, 8), 1.0 + i))
s.register_buffer('other', torch.full((8, 8), 2.0))
"""
# For some layers, `view` is of the layer's other buffer; of a buffer that the layer reads too; of the previous layer's.
SOME_VIEWS = VIEWS + "s.view = (s.cache if i in (2, 4) else s.other).view(64)"
OWN_VIEWS = VIEWS + "s.view = s.cache.view(64) if i in (2, 4) else torch.full((64,), 2.0)"
NEIGHBOURS = VIEWS + "s.view = (m.layers[i - 1] if i in (3, 5) else s).cache.view(64)"
# The third layer's buffers are one.
MIXED = """\
s.register_buffer('one', torch.full((8,), 1.0 + i))
s.register_buffer('two', s.one if i == 2 else torch.full((8,), 1.0))
"""
SCALE = "s.scale = torch.full((8,), float(i + 1))"
SQUARE = "m.square = torch.arange(64.0).div(64).reshape(8, 8)"

# Once copied though they differ.
_WRONG_ONCE = (
    case(
        "nested containers",
        "s.options = {'scaling': [{'factor': (0, 2.0 if i >= 3 else 0.0)}]}",
        "y = y * 1.5 if s.options['scaling'][0]['factor'][1] > 1 else y",
    ),
    case("default of a function", "s.f = lambda y, k=float(i): y * k", "y = s.f(y)"),
    case("field of a named tuple", "s.cfg = Scale(float(i))", "y = y * s.cfg.by"),
    case("attribute of a float", "s.cfg = extra(MyFloat(1.0), float(i))", "y = y * s.cfg.extra"),
    case(
        "dict that the model reads first",
        "s.cfg = {'k': float(i)}",
        "y = y * s.cfg['k']",
        "x = x + 1 if layer.cfg['k'] > 2 else x",
    ),
    case(
        "partial that the model calls first",
        "s.f = functools.partial(torch.mul, float(i + 1))",
        "y = y + s.lin(s.f(x))",
        "x = layer.f(x)",
    ),
    case(
        "type of a dict's keys",
        "s.d = {1: 1} if i % 2 else {1.0: 1}",
        "y = y + (2 if isinstance(next(iter(s.d)), float) else 1)",
    ),
    case("range with the same items", "s.r = range(0, 3 + i % 2, 2)", "y = y * s.r.stop"),
    case(
        "value in a mapping proxy",
        "s.d = types.MappingProxyType({'a': 1.0 if i % 2 else 1})",
        "y = y + (2 if isinstance(s.d['a'], float) else 1)",
    ),
    case("argument that is the first layer's own buffer", SCALE, "y = y * a + s.scale", "", "m.layers[0].scale"),
    case("argument that is the previous layer's buffer", SCALE, "y = y * a + s.scale", "", "m.layers[n - 1].scale"),
    case("table keyed by a parameter", "TABLE[s.lin.weight] = float(i)", "y = y * TABLE[s.lin.weight]"),
    case("table keyed by a module", "TABLE[s.lin] = float(i)", "y = y * TABLE[s.lin]"),
    case("table keyed by an object", "s.key = Box(by=1); TABLE[s.key] = float(i)", "y = y * TABLE[s.key]"),
    case("membership in a list outside", "if i == 0: PARTS.append(s.lin)", "y = y + (1 if s.lin in PARTS else 0)"),
    case("membership of a later layer", "if i in (3, 4): PARTS.append(s.lin)", "y = y + (1 if s.lin in PARTS else 0)"),
    case("subclass of an ordered dict", "s.d = MyOrdered(k=float(i + 1))", "y = y * s.d['k']", "x = x * layer.d['k']"),
    case(
        "ordered dict that the model reads first",
        "s.d = collections.OrderedDict(k=float(i + 1))",
        "y = y * s.d['k']",
        "x = x * layer.d['k']",
    ),
    case("dtype", KIND, "y = y.to(s.kind).float() * (2 if s.kind == torch.float32 else 1)"),
    case("dtype that the model reads first", KIND, "y = y.to(s.kind).float()", "x = x.to(layer.kind).float()"),
    case("function that the model calls first", FUNCTION, "y = s.f(y)", "x = layer.f(x)"),
    case("function that is compared", FUNCTION, "y = y * (2 if s.f is torch.sin else 1)", "seen = layer.f"),
    case(
        "enum member",
        "s.colour = list(Colour)[i % 3]",
        "y = y * (2 if s.colour is Colour.RED else s.colour.value)",
        "seen = layer.colour",
    ),
    case("range that the model reads first", "s.r = range(i + 1)", "y = y * len(s.r)", "seen = sum(layer.r)"),
    case("item of a tuple", "s.t = (1, float(i))", "y = y * s.t[1]", "x = x + layer.t[1]"),
    case("item of a deque", "s.t = collections.deque([1, float(i)])", "y = y * s.t[1]", "x = x + layer.t[1]"),
    case("nested dict", "s.d = {'a': {'b': float(i)}}", "y = y * s.d['a']['b']", "seen = layer.d['a']"),
    case(
        "object with a dict", "s.o = Box(table={'k': float(i)})", "y = y * s.o.table['k']", "x = x + layer.o.table['k']"
    ),
    case(
        "isinstance",
        "s.q = [] if i % 2 else ()",
        "y = y * (2 if isinstance(s.q, list) else 1)",
        "seen = isinstance(layer.q, list)",
    ),
    case("zero and minus zero", "s.z = -0.0 if i % 2 else 0.0", "y = y * math.copysign(2, s.z)"),
    case("zero and minus zero in a tuple", "s.z = (1, -0.0 if i % 2 else 0.0)", "y = y * math.copysign(2, s.z[1])"),
    case("order of a set", "s.some = set([0, 8][:: -1 if i % 2 else 1])", "y = y * (1 + next(iter(s.some)))"),
    case("frozen dataclass in a set", "s.some = {Frozen(float(i))}", "y = y * next(iter(s.some)).by"),
    case("mangled slot", "s.o = Slotted(float(i))", "y = y * s.o.by", "seen = layer.o.by"),
    case("property", "s.o = Private(float(i))", "y = y * s.o.by", "seen = layer.o.by"),
    case(
        "argument that is transposed in place", SQUARE, "a.t_(); y = y @ a", "", "m.square + (1 if n in (2, 4) else 2)"
    ),
    case("argument that is transposed in place, once for each layer", SQUARE, "a.t_(); y = y @ a", "", "m.square + 1"),
    case(
        "deterministic algorithms around a call",
        "",
        "y = y * (2 if torch.are_deterministic_algorithms_enabled() else 1)",
        "torch.use_deterministic_algorithms(n in (2, 5))",
    ),
    case("view updated in place that aliases for some", SOME_VIEWS, "s.view.add_(1); y = y @ s.cache + s.other[0]"),
    case(
        "view updated in place of a buffer that is read, for some",
        OWN_VIEWS,
        "s.view.add_(1); y = y @ s.cache + s.view[:8]",
    ),
    case(
        "view updated in place of a buffer that is read, for some, in pieces",
        OWN_VIEWS,
        "s.view.add_(1); y = attn(y @ s.cache + s.view[:8], Name(s.name))",
    ),
    case(
        "view updated in place of the previous layer's buffer, for some", NEIGHBOURS, "s.view.add_(1); y = y @ s.cache"
    ),
    case("buffers of one storage for some, updated in place", MIXED, "s.two.add_(1); y = y * s.one + s.two"),
    case(
        "set of which an item is a module",
        "m.chosen = {m.layers[1], m.layers[4]}",
        "y = y * (2 if s in s.holder[0].chosen else 1)",
    ),
    case("module's attribute", "s.o = types.ModuleType('made'); s.o.by = float(i)", "y = y * s.o.by"),
    case(
        "keyword default that the model calls first",
        "s.f = keyword_default(float(i))",
        "y = y * s.f()",
        "x = x + layer.f()",
    ),
    case("closure that the model calls first", "s.f = closure(float(i))", "y = y * s.f()", "x = x + layer.f()"),
    case("hook's closure", "s.register_forward_hook(lambda s, a, o, k=i + 1: o * k)", "pass"),
    case(
        "buffer that is None in a middle one",
        "s.buf = None if i == 3 else nn.Buffer(torch.full((8,), 2.0))",
        "y = y if s.buf is None else y * s.buf",
        "seen = layer.buf",
    ),
)

NAMED = "y = attn(y, Name(s.name))"
PATCHED = "(lambda lin, k: lambda x: nn.functional.linear(x, lin.weight) * k)"
TWO = "s.lin2 = nn.Linear(8, 8).requires_grad_(False)\n"
TIED = "s.lin2.weight = s.lin.weight"
ADDED = "y = y + s.lin2(x)"

# Stacks that set traps, and what must go on being copied.
_TRAPS = (
    case("plain", "", "y = y.relu()", copies=5),
    case("index read", "", "y = y * 2 if s.idx % 2 else y", copies=0),
    case("index read outside", "", "pass", call="x = CALL if layer.idx % 2 else CALL + 1", copies=0),
    case("scalar per layer", "s.scale = float(i)", "y = y * s.scale", copies=0),
    case("scalar alternating", "s.scale = float(i % 2)", "y = y * s.scale", copies=4),
    case("flag", "s.on = i % 3 == 0", "y = y.relu() if s.on else y", copies=4),
    case("name", "", NAMED, copies=5),
    case("name, then inspected", "", f"{NAMED} * (2 if s.name.endswith('3') else 1)", copies=0),
    case("inspected, then a name", "", f"y = y * (2 if '3' in s.name else 1); {NAMED}", copies=0),
    case("name inspected outside", "", NAMED, call="x = CALL if layer.name.endswith('1') else CALL + 1"),
    case("name made of a name", "", "y = attn(y, Name(s.name + '.attn'))", copies=0),
    case("string to an op", "", "y = torch.ops.t.attn_str(y, s.name)", copies=0),
    case("name object", "s.obj = Name(f'n{i}')", "y = attn(y, s.obj)"),
    case(
        "in a set, by what it holds", "s.some = {Frozen(1.0)}", "y = y * (2 if Frozen(1.0) in s.some else 3)", copies=5
    ),
    case(
        "in a set, by its identity",
        "s.some, s.one = {Frozen(TABLE.setdefault(0, Box(by=1)))}, TABLE.setdefault(i % 2, Box(by=1))",
        "y = y * (2 if Frozen(s.one) in s.some else 3)",
        copies=4,
    ),
    case("hasattr", "if i % 2: s.odd = 1", "y = y * 2 if hasattr(s, 'odd') else y", copies=4),
    case("all weights tied", "s.lin.weight = m.layers[0].lin.weight", "pass", copies=5),
    case("weights of two layers tied", "if i == 4: s.lin.weight = m.layers[2].lin.weight", "pass", copies=5),
    case("weight of first tied to third", "if i == 2: s.lin.weight = m.layers[0].lin.weight", "pass", copies=5),
    case("weights tied in a later layer", f"{TWO}if i == 3: {TIED}", ADDED),
    case("weights tied in the traced layer", f"{TWO}if i == 0: {TIED}", ADDED),
    case("weights tied in each layer", TWO + TIED, ADDED, copies=5),
    case("module tied in one layer", f"{TWO}if i == 3: s.lin2 = s.lin", ADDED),
    case("no bias in one", "if i == 3: s.lin = nn.Linear(8, 8, bias=False)", "pass", copies=4),
    case("same object twice", "if i == 3: m.layers[3] = m.layers[1]", "pass", copies=5),
    case("same object in each place", "m.layers[i] = m.layers[0]", "pass", copies=5),
    case("two lists", "m.more = nn.ModuleList(list(m.layers)[:3])", "pass", copies=4),
    case("layer counts its calls", "s.calls = 0", "s.calls = s.calls + 1", copies=0),
    # vLLM's shared experts do.
    case("list that is put back", "s.kept = [None]", "s.kept[0] = y; y = s.kept[0] * 2; s.kept[0] = None", copies=5),
    case("outer appends", "", "pass", after="m.log.append(layer.idx)"),
    case("outer sets a flag", "", "pass", "m.flag = layer.idx"),
    case(
        "outer sets a flag that layers read",
        "",
        "y = y * (2 if s.holder[0].flag % 2 else 1)",
        "m.flag = layer.idx",
        copies=0,
    ),
    case("global counter", "", "y = y * COUNT", "COUNT = COUNT + 1", ahead="global COUNT", copies=0),
    case("log read", "", "y = y * len(s.holder[0].log)", after="m.log.append(layer.idx)", copies=0),
    case("closure with a weight", "s.f = (lambda w: lambda x: x @ w)(torch.randn(8, 8))", "y = s.f(x)", copies=5),
    case("closure with a scalar", "s.f = (lambda k: lambda x: x * k)(float(i))", "y = s.f(x)", copies=0),
    case("different functions", "s.f = torch.relu if i % 2 else torch.tanh", "y = s.f(y)", copies=4),
    case("dict, one key read", "s.cfg = {'k': i // 3, 'u': i}", "y = y * s.cfg['k']", copies=0),
    case("dict iterated", "s.cfg = {'k': i // 3, 'u': 1}", "y = y * sum(s.cfg.values())", copies=4),
    case(
        "dict, another order",
        "s.cfg = {'a': 2, 'b': 3} if i % 2 else {'b': 3, 'a': 2}",
        "y = y * next(iter(s.cfg.values()))",
        copies=4,
    ),
    case("read by __dict__", "", "y = y * s.__dict__['idx']", copies=0),
    case("read by vars", "", "y = y * vars(s)['idx']", copies=0),
    case("config object by vars", "s.cfg = Box(k=i)", "y = y * vars(s.cfg)['k']", copies=0),
    case("config object", "s.cfg = Box(k=i // 3, u=i)", "y = y * s.cfg.k", copies=4),
    case("list of another length", "s.ls = [1] * (i // 3 + 1)", "y = y * len(s.ls)", copies=4),
    case("table by index", "s.tab = [1, 2, 3, 4, 5, 6]", "y = y * s.tab[s.idx]", copies=0),
    case("set of numbers", "s.some = {1, 4}", "y = y * (2 if s.idx in s.some else 1)", copies=0),
    case("global tensor", "globals()['GLOBAL'] = torch.ones(8)", "y = y + GLOBAL", copies=5),
    case("hook on one", "if i == 3: s.register_forward_hook(lambda s, a, o: o * 2)", "pass", copies=4),
    case("hook on the traced one", "if i == 0: s.register_forward_hook(lambda s, a, o: o * 2)", "pass", copies=4),
    case(
        "pre-hook inside one", "if i == 3: s.lin.register_forward_pre_hook(lambda s, a: (a[0] * 2,))", "pass", copies=4
    ),
    case("hooks on all", "s.register_forward_hook((lambda k: lambda m, a, o: o * k)(i))", "pass", copies=0),
    case("another __class__ inside", "if i == 3: s.lin.__class__ = TripleLinear", "pass", copies=4),
    case("forward patched on one", f"if i == 3: s.forward = {PATCHED}(s.lin, 5)", "pass", copies=4),
    case("forward patched inside one", f"if i == 3: s.lin.forward = {PATCHED}(s.lin, 5)", "pass", copies=4),
    case("forward patched on all", f"s.forward = {PATCHED}(s.lin, i)", "pass", copies=0),
    case("training flag", "s.train(i == 3)", "y = y * 2 if s.training else y", copies=4),
    case("type of an attribute", "s.q = 1 if i % 2 else 1.0", "y = y * (2 if type(s.q) is int else 1)", copies=4),
    case("getattr by name", "if i == 3: s.layers_3 = 5", "y = y * getattr(s, s.name.replace('.', '_'), 1)"),
    case("is the first layer", "", "y = y * (2 if s.holder[0].layers[0] is s else 1)"),
    case("is a listed layer", "if i == 4: m.log.append(s)", "y = y * (2 if s.holder[0].log[0] is s else 1)"),
    case("reads its own identity", "s.ids = {id(m.layers[2])}", "y = y * (2 if id(s) in s.ids else 1)"),
    case("passes its argument", "", "y = x"),
    case("returns a list", "", "pass", returns="[y]", call="x = CALL[0]", copies=5),
    case("returns a dict", "", "pass", returns="{'a': y}", call="x = CALL['a']", copies=0),
    case("returns a view", "", "pass", returns="y.chunk(2, -1)", call="x = torch.cat(CALL, -1)", copies=0),
    case("returns a view of its argument", "", "y = x.view(-1, 8)", copies=0),
    case(
        "view mutated outside",
        "",
        "pass",
        "x = x * 1",
        returns="y, x.view(-1)",
        call="y, v = CALL; v.add_(1); x = y + x",
        copies=0,
    ),
    case(
        "residual",
        "",
        "r = x if r is None else x + r",
        args=[("r", "None if n == 0 else r")],
        returns="y, r",
        call="x, r = CALL",
        copies=4,
    ),
    case("its result in place", "", "y = y.add_(1)", copies=5),
    case("mutates a buffer", "s.register_buffer('buf', torch.zeros(8))", "y = y + s.buf.add_(1)", copies=5),
    case("mutates its argument", "", "x.add_(1); y = s.lin(x)", "x = x * 1", copies=5),
    case("function mode around some", "", "pass", around="(Doubles() if n % 2 else contextlib.nullcontext())"),
    case("autocast around some", "", "y = y.float()", around="torch.autocast('cpu', torch.bfloat16, enabled=n >= 3)"),
    case(
        "grad mode around some",
        "",
        "y = y * (2 if torch.is_grad_enabled() else 1)",
        around="torch.set_grad_enabled(n == 3)",
    ),
    case(
        "puts back what it changes",
        "s.slot, s.slots = None, [None]",
        "s.slot, s.slots[0] = s.idx, 1; y = s.lin(x); s.slot, s.slots[0] = None, None",
        copies=0,
    ),
    case(
        "puts back what it changes, reading nothing",
        "s.slot = None",
        "s.slot = 1; y = s.lin(x); s.slot = None",
        copies=5,
    ),
    case("views across pieces", "", "y = y + torch.sigmoid(y.view(-1)).view(-1, 8)", copies=5),
    case(
        "buffer written across pieces", "", "o = torch.empty_like(x); torch.ops.t.attn_out(y, o); y = o + y", copies=5
    ),
    case("size passed on", "", "y = y.view(x.size(0), -1) + x.shape[0]", copies=5),
)
CASES: dict[str, Stack] = {stack.what: stack for stack in (*_WRONG_ONCE, *_TRAPS)}
