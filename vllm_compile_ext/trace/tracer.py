"""Trace once: a repeated layer is traced one time a kind, and later calls of its kind become one node each.

`Tracer.install()` listens while Dynamo traces.  The first call of a kind is traced inline, as always; what it added to
the graph is its *body*.  A later call of a sibling of the same kind only adds a marker node, which `stitch` replaces by
a copy of the body with that layer's own tensors.  Siblings are children of one ModuleList with `least` or more of their
class.  A call is copied only if it is proven that its trace would be the body:

* it is called with the same signature (signature.py), under the same state of torch and of Python (state.py);
* whatever code could see of the layer is the same (same_kind.py), but for tensors, for names that only went into the
  constructor of an opaque graph input, and for attributes under a name that no code of the trace has said (values.py);
* the body did not depend on which objects the layer's own ones are, and nothing outside of the layer that the body
  could reach is a part of it (watch.py tells);
* all that Dynamo recorded of the body is of a kind that is known here (kinds.py).

Everything else is traced as Dynamo does it, and `Tracer.reasons` says why.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext.trace import kinds, watch
from vllm_compile_ext.trace.bodies import CALL, Body, Call, NotOnce, Opaque, keep_alive, region
from vllm_compile_ext.trace.same_kind import Different, Reach, Same, compare, storage_of
from vllm_compile_ext.trace.signature import (
    Arguments,
    check_returned,
    first_difference,
    metadata,
    results,
    returned,
    storage,
)
from vllm_compile_ext.trace.state import Snapshot
from vllm_compile_ext.trace.values import Accessed


def find_groups(root: torch.nn.Module, least: int = 3) -> dict[int, int]:
    """id of every module in a ModuleList that holds at least `least` of its class -> number of the list."""
    groups: dict[int, int] = {}
    for number, module in enumerate(m for m in root.modules() if isinstance(m, torch.nn.ModuleList)):
        kinds: dict[type, list[torch.nn.Module]] = {}
        for child in module:
            kinds.setdefault(type(child), []).append(child)
        for children in kinds.values():
            if len(children) >= least:
                groups.update((id(c), number) for c in children)
    return groups


class Tracer:
    """One capture of `root`.  `traced` and `stamped` count the calls of repeated layers, `reasons` says why calls were
    traced that might have been stamped.

    lookups: functions that run while tracing (`assume_constant_result`) and make a string of a layer-name object, which
    the model uses for nothing but to find the layer in one of `tables`.  skip: ids of layers that are traced whatever
    they are like.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        least: int = 3,
        lookups: Collection[Callable[..., Any]] = (),
        tables: Collection[dict[str, Any]] = (),
        skip: Collection[int] = (),
    ) -> None:
        self.root = root
        self.groups = find_groups(root, least)
        self.lookups = lookups
        self.tables = tables
        self.skip = frozenset(skip)
        self.reasons: list[str] = []
        self.tensors = _by_storage(root)
        self._restart(None)

    def _restart(self, output: Any) -> None:
        self._output = output
        self._bodies: dict[tuple[int, type], list[_Traced]] = {}
        self._inside = False
        self.accessed = Accessed()
        self.seen = watch.Seen()
        self.parts = [self.seen]
        self._inputs: dict[fx.Node, tuple[int | None, int | None]] = {}
        self.calls: list[tuple[int, _Traced]] = []  # id of each layer that was stamped, and the body
        self.traced = 0
        self.stamped = 0

    @contextlib.contextmanager
    def install(self) -> Iterator[None]:
        """Listen to what Dynamo traces on this thread.  Leaves no trace of itself, however it ends."""
        with watch.listening(self):
            yield
        self._output = None  # a capture's graph is the caller's: do not keep it alive

    def on_call(self, module: Any, tx: Any, args: list[Any], kwargs: dict[str, Any], trace: Callable[[], Any]) -> Any:
        """Dynamo is about to trace a call of an nn.Module; `trace` does it."""
        layer = module.value
        if self._output is not tx.output:  # another frame, or Dynamo started over
            self._restart(tx.output)
            watch.note_code(self, tx.output.root_tx.f_code)
        if id(layer) not in self.groups or self._inside or len(tx.output.tracers) != 1:
            return trace()
        name = type(layer).__name__ if module.source is None else module.source.name
        try:
            # This expression is all that finds the layer's tensors later: it must lead back to this very object.
            if module.source is None or tx.output.resolve_source_value(module.source) is not layer:
                raise NotOnce("has no access expression")
            if tx.output.resolve_source_value(_first(module.source)) is not self.root:
                raise NotOnce("is not reached from the model")
            arguments = Arguments(tx, args, kwargs)
            state = Snapshot(tx)
        except NotOnce as why:
            self.reasons.append(f"{name}: {why}")
            return trace()
        family = self._bodies.setdefault((self.groups[id(layer)], type(layer)), [])
        for traced in () if id(layer) in self.skip else family:
            try:
                call = traced.call(layer, module.source.name, arguments, state)
            except (Different, NotOnce) as why:
                self.reasons.append(f"{name}: {why}")
                continue
            self.stamped += 1
            self.calls.append((id(layer), traced))
            return _stamp(tx, call, arguments)
        self.traced += 1
        return self._record(tx, family, module, arguments, state, trace)

    def memory_of_inputs(self, tx: Any) -> dict[int | None, int]:
        """Storage of the fake tensor of each graph input -> the real memory."""
        for node in tx.output.graph.find_nodes(op="placeholder"):
            if node not in self._inputs:
                value = _resolve(tx, getattr(node.meta.get("grapharg"), "source", None))
                memory = storage_of(value) if isinstance(value, torch.Tensor) else None
                self._inputs[node] = storage(node), memory
        return {fake: memory for fake, memory in self._inputs.values() if fake and memory}

    def last_of_each_kind(self) -> set[int]:
        """ids of the last stamped layer of each body."""
        return set({id(traced): layer for layer, traced in self.calls}.values())

    def _record(
        self,
        tx: Any,
        family: list[_Traced],
        module: Any,
        arguments: Arguments,
        state: Snapshot,
        trace: Callable[[], Any],
    ) -> Any:
        before, guarded = set(tx.output.graph.nodes), kinds.guards(tx)
        inputs = _inputs(before)
        tracer = tx.output.root_tracer
        outer, tracer.traced_sources = tracer.traced_sources, type(tracer.traced_sources)()
        seen = watch.Seen()
        self._inside, self.parts = True, [self.seen, seen]
        try:
            result = trace()
        finally:
            self._inside, self.parts = False, [self.seen]
            sources, tracer.traced_sources = tracer.traced_sources, outer
            outer.update(sources)
        try:
            after = Snapshot(tx)
            if after != state:
                raise NotOnce(f"changes Python's state: {after.since(state)}")
            nodes = tx.output.graph.nodes
            if _inputs(before) != inputs or any(_is_changed(tx, n) for n in nodes if n not in before):
                raise NotOnce("changes the sizes or strides of a tensor from outside")
            new = [n for n in nodes if n not in before and n.op != "placeholder"]
            body = Body(module.value, arguments.signature, new, arguments.nodes, state)
            traced = _Traced(self, tx, body, arguments, seen, set(sources))
            traced.check_kinds(kinds.guards(tx) - guarded)
            traced.finish(result, before)
            family.append(traced)
        except NotOnce as why:
            self.reasons.append(f"{module.source.name}: {why}")
        return result


class _Traced:
    """A body, and what decides who may share it."""

    def __init__(
        self, tracer: Tracer, tx: Any, body: Body, arguments: Arguments, seen: watch.Seen, sources: set[Any]
    ) -> None:
        self.tracer = tracer
        self.tx = tx
        self.body = body
        self.seen = seen
        self.sources = sources
        self.arguments = arguments
        self.opaque: list[Opaque] = []
        self.outside: Reach | None = None  # what the body's code could reach, and what objects of both layers could
        self.memo: dict[int, Reach] = {}
        self.said = -1
        for variable in arguments.variables:
            if variable.source is not None and (name := _read_below(variable.source, sources)):
                raise NotOnce(f"reads {name} of an argument")

    def check_kinds(self, guards: Iterable[Any]) -> None:
        """Raises `NotOnce` when Dynamo recorded something of a kind that is not known."""
        for source in self.sources:
            kinds.check_source(source)
        for guard in guards:
            if kinds.is_identity(guard):
                value = _resolve(self.tx, guard.originating_source)
                self.seen.identities.append((value, value))

    def finish(self, result: Any, before: set[fx.Node]) -> None:
        """Describe results and inputs.  Raises `NotOnce` when copies cannot have their like."""
        body, tx = self.body, self.tx
        inside = set(body.nodes)
        body.outputs = results(result, inside, body.args)
        for node in body.nodes:
            for source in node.all_input_nodes:
                if source not in inside and source not in body.args and source not in body.inputs:
                    body.inputs[source] = _classify(tx, source, source not in before)
        outs = returned(body.outputs)
        check_returned(outs, [*body.args, *body.inputs])
        _check_symbols(body)
        self.opaque = [w for w in body.inputs.values() if isinstance(w, Opaque)]
        for foreign in self.seen.foreign:
            if foreign.fn not in self.tracer.lookups:
                raise NotOnce(f"a function runs while it is traced: {getattr(foreign.fn, '__name__', foreign.fn)}")
            self.opaque += [o for v in foreign.variables if (o := _unused(tx, v)) is not None]
        if self.seen.inspected and any(what.origins for what in self.opaque):
            raise NotOnce("looks at an opaque object that it made of the layer's name")
        tracer = tx.output.root_tracer
        tx.output.create_proxy("call_function", keep_alive, tuple(fx.Proxy(n, tracer) for n in outs), {})

    def call(self, layer: torch.nn.Module, source: str, arguments: Arguments, state: Snapshot) -> Call:
        """The call of `layer` as one of this body.  Raises `Different` or `NotOnce` unless it is the same kind."""
        body = self.body
        if body.signature != arguments.signature:
            raise NotOnce(f"called differently: {first_difference(body.signature, arguments.signature)}")
        if body.state != state:
            raise NotOnce(f"Python's state has changed: {state.since(body.state)}")
        for one, other in zip(self.arguments.real, arguments.real, strict=True):
            if one is None or other is None:
                _check_like_made(one if other is None else other, self.tracer.accessed)
            elif one is not other:
                compare(one, other, self.tracer.accessed)
        same = compare(body.layer, layer, self.tracer.accessed, self._lifted())
        self._check_identity(same)
        self._check_memory(same, (*body.args, *arguments.nodes))
        if self.seen.foreign:
            self._check_lookups(same)
        call = Call(body, layer, source, same.tensors)
        for node, what in body.inputs.items():
            if isinstance(what, Opaque) and (found := self._arguments(what, same, source)):
                call.lifted[node] = found
        return call

    def _lifted(self) -> set[tuple[int, str]]:
        """(id of owner, step) of each string that only went into an opaque object's constructor."""
        found = [origin for what in self.opaque for origin in what.origins if origin is not None]
        origins = {(id(owner), f".{key}") for owner, key in found}
        keys = {step[1:] for _, step in origins}
        looked_at = set(self.tx.output.root_tracer.traced_sources)
        looked_at |= {g.originating_source for g in kinds.guards(self.tx) if g.create_fn_name() != "TYPE_MATCH"}
        for source in looked_at:
            base, key = kinds.last_step(source)
            if key in keys:
                origins.discard((id(_resolve(self.tx, base)), f".{key}"))
        return origins

    def _check_identity(self, same: Same) -> None:
        for one, other in self.seen.identities:
            if all(value is watch.UNKNOWN or same.holds(value) for value in (one, other)):
                raise NotOnce("the trace depends on which object something is")
        if not same.own.keys().isdisjoint(same.counterparts):
            raise NotOnce("a part of one layer is a part of the other, in another place")
        accessed = self.tracer.accessed
        if self.outside is None or self.said != accessed.changes:
            self.outside, self.said, self.memo = Reach(accessed, self.tracer.tables), accessed.changes, {}
            for value in self.seen.roots():
                if id(value) not in same.own:
                    self.outside.add(value)
        for reach in (self.outside, *map(self._reach_of, same.shared)):
            for ids in (same.own, same.counterparts):
                if not reach.ids.isdisjoint(ids):
                    held = next(i for i in ids if i in reach.ids)
                    raise NotOnce(f"something outside of the layer holds a part of it, a {self._type(same, held)}")

    def _reach_of(self, value: Any) -> Reach:
        """What can be reached from an object that both layers have."""
        if id(value) not in self.memo:
            self.memo[id(value)] = Reach(self.tracer.accessed, self.tracer.tables)
            self.memo[id(value)].add(value)
        return self.memo[id(value)]

    @staticmethod
    def _type(same: Same, held: int) -> str:
        return type(same.own.get(held, same.counterparts.get(held))).__qualname__

    def _check_memory(self, same: Same, arguments: Iterable[fx.Node]) -> None:
        """Raises `NotOnce` where one of the layer's own tensors shares memory with a tensor that is not its own: then
        the layers' graphs differ in what overlaps."""
        real = self.tracer.memory_of_inputs(self.tx)
        given = {real[key] for n in arguments if (key := storage(n)) in real}
        reached: dict[int, set[int]] = {}
        assert self.outside is not None
        for tensor in self.outside.tensors.values():
            reached.setdefault(storage_of(tensor), set()).add(id(tensor))
        for path, right in same.tensors.values():
            for tensor in (same.counterparts[id(right)], right):
                memory = storage_of(tensor)
                others = self.tracer.tensors.get(memory, set()) | reached.get(memory, set())
                if memory in given or any(i not in same.own and i not in same.counterparts for i in others):
                    raise NotOnce(f"{path} shares memory with a tensor from outside of the layer")

    def _check_lookups(self, same: Same) -> None:
        """Raises `NotOnce` unless names found the layer's own parts in a table, where the others' find theirs."""
        found = 0
        for source in self.sources:
            base, key = kinds.last_step(source)
            table = _resolve(self.tx, base)
            if not any(table is t for t in self.tracer.tables):
                continue
            if key not in same.names or same.own.get(id(table.get(key)), table) is not table.get(same.names[key]):
                raise NotOnce(f"{source.name} is found by the layer's name, and is no part of the layer")
            found += 1
        if not found:
            raise NotOnce("a function reads the layer's name")

    @staticmethod
    def _arguments(what: Opaque, same: Same, source: str) -> tuple[tuple[Any, ...], str] | None:
        """(the constructor's arguments for the other layer, expression of the first that differs), None: the same."""
        args = [
            same.names.get(a, a) if origin is not None and type(a) is str else a
            for a, origin in zip(what.args, what.origins, strict=True)
        ]
        return None if args == list(what.args) else (tuple(args), source)


def _by_storage(root: torch.nn.Module) -> dict[int, set[int]]:
    """Memory -> ids of the model's tensors that are in it."""
    found: dict[int, set[int]] = {}
    for module in root.modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    found.setdefault(storage_of(value), set()).add(id(value))
    return found


# What a tensor from outside may have, and one that the trace made has not.
_OF_OUTSIDE = {"_base", "_is_view", "_version", "is_inference", "is_leaf", "grad", "grad_fn", "data_ptr", "is_shared"}


def _check_like_made(tensor: torch.Tensor | None, accessed: Accessed) -> None:
    """Raises `NotOnce` unless code that has `accessed` what it has cannot tell an argument from outside from one that
    the trace made: the first layer often gets the former, the others the latter."""
    if tensor is None:
        return
    said = sorted(_OF_OUTSIDE & accessed.said)
    own = [k for k, _ in accessed.of(torch.nn.Parameter, vars(tensor)) if not k.startswith("_dynamo")]
    if said or own or type(tensor) is not torch.Tensor:
        raise NotOnce(f"an argument is from outside, and code reads {', '.join([*said, *own]) or 'its class'}")


def _inputs(nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
    """What is known of tensors from outside of a body; `t_()` and the like change it."""
    values = ((n, n.meta.get("example_value")) for n in nodes)
    return {n: metadata(v) for n, v in values if isinstance(v, torch.Tensor)}


def _is_changed(tx: Any, node: fx.Node) -> bool:
    """Whether a graph input that a body was the first to read is no longer as it was."""
    fake = node.meta.get("example_value")
    if node.op != "placeholder" or not isinstance(fake, torch.Tensor) or fake.layout != torch.strided:
        return False
    real = _resolve(tx, getattr(node.meta.get("grapharg"), "source", None))
    if not isinstance(real, torch.Tensor):  # numpy's, of which nothing can be changed in place
        return False
    sizes = (*fake.shape, *fake.stride(), fake.storage_offset())
    symbolic = any(isinstance(size, torch.SymInt) for size in sizes)
    return not symbolic and sizes != (*real.shape, *real.stride(), real.storage_offset())


def _resolve(tx: Any, source: Any) -> Any:
    """The value that a source leads to, `UNKNOWN` where it is of Dynamo's own making."""
    if source is None:
        return watch.UNKNOWN
    try:
        return tx.output.resolve_source_value(source)
    except Exception:
        return watch.UNKNOWN


def _first(source: Any) -> Any:
    """The local or global that an access path starts from."""
    while hasattr(source, "base"):
        source = source.base
    return source


def _read_below(base: Any, sources: set[Any]) -> str | None:
    """The name of one of `sources` that reads something of `base`."""
    for source in sources:
        step = getattr(source, "base", None)
        while step is not None:
            if step == base:
                return str(source.name)
            step = getattr(step, "base", None)
    return None


def _classify(tx: Any, node: fx.Node, new: bool) -> torch.Tensor | Opaque | None:
    """What a copy of a body reads in place of `node`, an input of it.  `new`: the body is the first to read it."""
    from torch._dynamo.source import SyntheticLocalSource

    if node.op != "placeholder":
        return None
    example = node.meta.get("example_value")
    source = getattr(node.meta.get("grapharg"), "source", None)
    if not isinstance(example, torch.Tensor) and isinstance(
        example, int | float | bool | torch.SymInt | torch.SymFloat
    ):
        if new:
            raise NotOnce(f"reads a number that is a graph input, {node.name}")
        return None
    if source is None:
        raise NotOnce(f"input {node.name} has no access expression")
    if isinstance(source, SyntheticLocalSource):
        return _opaque(tx, source)
    value = _resolve(tx, source)
    if value is watch.UNKNOWN:
        raise NotOnce(f"input {node.name} cannot be found by its expression")
    if not isinstance(value, torch.Tensor):
        if new:
            raise NotOnce(f"reads a {type(value).__name__} that is a graph input")
        return None
    return value


def _opaque(tx: Any, source: Any) -> Opaque:
    ctor, args, sources = tx.output.synthetic_source_ctor_info[source]
    origins = [None if s is None else _origin(tx, s) for s in sources or [None] * len(args)]
    return Opaque(ctor, tuple(args), tuple(origins))


def _unused(tx: Any, variable: Any) -> Opaque | None:
    """An opaque object that tracing made, and that need not have become a graph input."""
    real = variable.realize()
    sources, given = getattr(real, "ctor_arg_sources", None), getattr(real, "ctor_args_kwargs", None)
    if not sources or not given or given[1]:
        return None
    value = getattr(real.value, "real_obj", real.value)
    return Opaque(type(value), tuple(given[0]), tuple(None if s is None else _origin(tx, s) for s in sources))


def _origin(tx: Any, source: Any) -> tuple[Any, Any] | None:
    base, key = kinds.last_step(source)
    return None if base is None else (tx.output.resolve_source_value(base), key)


_SYMBOLIC = torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool


def _check_symbols(body: Body) -> None:
    """Raises `NotOnce` when the body makes sizes (`nonzero` and the like do): each copy would need its own."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    values = [n.meta.get("example_value") for n in (*body.args, *body.inputs)]
    known = free_unbacked_symbols([v for v in values if isinstance(v, _SYMBOLIC)])
    for node in body.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, _SYMBOLIC) and free_unbacked_symbols(value) - known:
            raise NotOnce(f"makes a size that depends on data, {node.name}")


def _stamp(tx: Any, call: Call, arguments: Arguments) -> Any:
    """Add the marker node of `call` to the graph; the variable of its result."""
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.builder import wrap_fx_proxy

    proxies = [fx.Proxy(n, tx.output.root_tracer) for n in arguments.nodes]
    marker = tx.output.create_proxy("call_function", region, tuple(proxies), {})
    marker.node.meta[CALL] = call
    outs = returned(call.body.outputs)
    values = []
    with tx.fake_mode:
        for node in outs:
            like = node.meta["example_value"]
            values.append(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device))
    marker.node.meta["example_value"] = tuple(values)
    made = {}
    for i, (node, value) in enumerate(zip(outs, values, strict=True)):
        item = tx.output.create_proxy("call_function", operator.getitem, (marker, i), {})
        made[node] = wrap_fx_proxy(tx, item, example_value=value)

    def build(o: Any) -> Any:
        if o[0] == "arg":
            return arguments.variables[o[1]]
        if o[0] == "node":
            return made[o[1]]
        if o[0] == "const":
            return ConstantVariable.create(o[1])
        return o[1]([build(i) for i in o[2]])

    return build(call.body.outputs)
