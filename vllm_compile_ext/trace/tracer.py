"""Trace once: a repeated layer is traced one time a kind, and later calls of its kind become one node each.

`Tracer.install()` listens while Dynamo traces.  The first call of a kind is traced inline, as always; what it added to
the graph is its *body*.  A later call of a sibling of the same kind only adds a marker node, which `stitch` replaces by
a copy of the body with that layer's own tensors.  Siblings are children of one ModuleList with `least` or more of their
class.  A call is copied only if it is proven that its trace would be the body:

* it passes the same arguments, under the same state of torch and of Python (call.py);
* whatever code could see of the layer is the same (same_kind.py), but for tensors, for names that only went into the
  constructor of an opaque graph input, and for attributes under a name that no code of the trace has said (values.py);
* the body did not depend on which objects the layer's own ones are, and nothing outside of the layer that the body
  could reach is a part of it (watch.py tells);
* all that Dynamo recorded of the body is of a kind that is known here (kinds.py).

Everything else is traced as Dynamo does it, and `Tracer.reasons` says why.
"""

from __future__ import annotations

import collections
import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext.trace import kinds, watch
from vllm_compile_ext.trace.call import (
    CALL,
    Arguments,
    Body,
    Call,
    NotOnce,
    Opaque,
    State,
    check_results,
    check_symbols,
    describe_results,
    first_difference,
    keep_alive,
    metadata,
    region,
    resolve,
    storage,
    value_of,
)
from vllm_compile_ext.trace.same_kind import Different, Reach, Same, compare, storage_of
from vllm_compile_ext.trace.values import Accessed


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
        self.groups: dict[int, int] = {}  # id of a layer that may be copied -> number of its ModuleList
        for number, modules in enumerate(m for m in root.modules() if isinstance(m, torch.nn.ModuleList)):
            count = collections.Counter(map(type, modules))
            self.groups.update((id(layer), number) for layer in modules if count[type(layer)] >= least)
        self.lookups = lookups
        self.tables = tables
        self.skip = frozenset(skip)
        self.reasons: list[str] = []
        self.tensors: dict[int, set[int]] = collections.defaultdict(set)  # memory -> ids of the model's tensors in it
        for module in root.modules():
            for values in (module._parameters, module._buffers, vars(module)):
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        self.tensors[storage_of(value)].add(id(value))
        self._restart(None)

    def _restart(self, output: Any) -> None:
        self._output = output
        self._kinds: dict[tuple[int, type], list[_Kind]] = {}
        self._inside = False
        self.accessed = Accessed()
        self.seen = self.part = watch.Seen()  # of the whole trace; of the body that is traced
        self._inputs: dict[fx.Node, tuple[int | None, int | None]] = {}
        self.last_copies: dict[_Kind, int] = {}  # id of the last layer of a kind that was stamped
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
            self.accessed.add_code(tx.output.root_tx.f_code)
        if id(layer) not in self.groups or self._inside or len(tx.output.tracers) != 1:
            return trace()
        name = type(layer).__name__ if module.source is None else module.source.name
        try:
            # This expression is all that finds the layer's tensors later: it must lead back to this very object.
            if resolve(tx, module.source) is not layer:
                raise NotOnce("has no access expression")
            if resolve(tx, [module.source, *kinds.bases(module.source)][-1]) is not self.root:
                raise NotOnce("is not reached from the model")
            arguments, state = Arguments(tx, args, kwargs), State(tx)
        except NotOnce as why:
            self.reasons.append(f"{name}: {why}")
            return trace()
        known = self._kinds.setdefault((self.groups[id(layer)], type(layer)), [])
        for kind in () if id(layer) in self.skip else known:
            try:
                call = kind.call(layer, name, arguments, state)
            except (Different, NotOnce) as why:
                self.reasons.append(f"{name}: {why}")
                continue
            self.stamped += 1
            self.last_copies[kind] = id(layer)
            return _stamp(tx, call, arguments)
        self.traced += 1
        return self._record(tx, known, module, arguments, state, trace)

    def _record(
        self, tx: Any, known: list[_Kind], module: Any, arguments: Arguments, state: State, trace: Callable[[], Any]
    ) -> Any:
        """The result of `trace`; it adds a kind to the known ones, if copies of it can be made."""
        before, guards = set(tx.output.graph.nodes), kinds.guards(tx)
        described = _describe_tensors(before)
        tracer = tx.output.root_tracer
        outer, tracer.traced_sources = tracer.traced_sources, type(tracer.traced_sources)()
        seen = watch.Seen()
        self._inside, self.part = True, seen
        try:
            result = trace()
        finally:
            self._inside, self.part = False, self.seen
            self.seen.include(seen)
            sources, tracer.traced_sources = tracer.traced_sources, outer
            outer.update(sources)
        try:
            if (after := State(tx)) != state:
                raise NotOnce(f"changes Python's state: {after.since(state)}")
            added = [n for n in tx.output.graph.nodes if n not in before]
            if _describe_tensors(before) != described or any(_is_changed(tx, n) for n in added):
                raise NotOnce("changes the sizes or strides of a tensor from outside")
            body = Body(module.value, [n for n in added if n.op != "placeholder"], arguments.nodes)
            kind = _Kind(self, tx, body, arguments, state, seen, set(sources))
            kind.check_record(kinds.guards(tx) - guards)
            kind.complete(result, before)
            known.append(kind)
        except NotOnce as why:
            self.reasons.append(f"{module.source.name}: {why}")
        return result

    def memory_of_inputs(self, tx: Any) -> dict[int | None, int]:
        """Storage of the fake tensor of each graph input -> the real memory."""
        for node in tx.output.graph.find_nodes(op="placeholder"):
            if node not in self._inputs:
                value = resolve(tx, _source(node))
                memory = storage_of(value) if isinstance(value, torch.Tensor) else None
                self._inputs[node] = storage(node), memory
        return {fake: memory for fake, memory in self._inputs.values() if fake and memory}


@dataclass(eq=False)
class _Kind:
    """Calls that share a trace: the body that was traced for the first one, and the proof that another is one of them.

    seen, sources: what that trace looked at, and the sources that Dynamo recorded of it.
    """

    tracer: Tracer
    tx: Any
    body: Body
    arguments: Arguments
    state: State
    seen: watch.Seen
    sources: set[Any]
    opaque: list[Opaque] = field(default_factory=list)
    # What code can reach from an object, by its id, and from outside.  Void once `Accessed.changes` is not `changes`.
    reached: dict[int, Reach] = field(default_factory=dict)
    outside: Reach | None = None
    changes: int = -1

    def check_record(self, guards: Iterable[Any]) -> None:
        """Raises `NotOnce` where Dynamo recorded something of a kind that is not known, or a look at an argument."""
        arguments = {v.source for v in self.arguments.variables if v.source is not None}
        for source in self.sources:
            for step in (source, *kinds.bases(source)):
                if type(step).__name__ not in kinds.COMPARED:
                    raise NotOnce(f"reads {step.name}, a {type(step).__name__}")
            if not arguments.isdisjoint(kinds.bases(source)):
                raise NotOnce(f"reads {source.name} of an argument")
        for guard in guards:
            if guard.create_fn_name() in kinds.IDENTITY:
                value = resolve(self.tx, guard.originating_source, watch.UNKNOWN)
                self.seen.identities.append((value, value))
            elif guard.create_fn_name() not in kinds.VALUE:
                raise NotOnce(f"Dynamo guards {guard.name} by {guard.create_fn_name()}")

    def complete(self, result: Any, before: set[fx.Node]) -> None:
        """Describe inputs and results of the body.  Raises `NotOnce` when copies cannot have their like."""
        body, tx = self.body, self.tx
        own = {*body.nodes, *body.args}
        for source in dict.fromkeys(n for node in body.nodes for n in node.all_input_nodes):
            if source not in own:
                body.inputs[source] = _classify(tx, source, source not in before)
        body.outputs = describe_results(result, body)
        check_results(body)
        check_symbols(body)
        self.opaque = [what for what in body.inputs.values() if isinstance(what, Opaque)]
        for function, variables in self.seen.foreign:
            if function not in self.tracer.lookups:
                raise NotOnce(f"a function runs while it is traced: {getattr(function, '__name__', function)}")
            self.opaque += [made for v in variables if (made := _unused_opaque(tx, v)) is not None]
        if self.seen.inspected and any(what.origins for what in self.opaque):
            raise NotOnce("looks at an opaque object that it made of the layer's name")
        results = tuple(fx.Proxy(n, tx.output.root_tracer) for n in body.results)
        tx.output.create_proxy("call_function", keep_alive, results, {})

    def call(self, layer: torch.nn.Module, source: str, arguments: Arguments, state: State) -> Call:
        """The call of `layer` as a copy of the body.  Raises `Different` or `NotOnce` unless it is proven to be one."""
        if self.arguments.description != arguments.description:
            where = first_difference(self.arguments.description, arguments.description)
            raise NotOnce(f"called differently: {where}")
        if self.state != state:
            raise NotOnce(f"Python's state has changed: {state.since(self.state)}")
        for one, other in zip(self.arguments.real, arguments.real, strict=True):
            if one is not None and other is not None:
                compare(one, other, self.tracer.accessed)
            elif (outside := other if one is None else one) is not None:
                _check_like_made(outside, self.tracer.accessed)
        same = compare(self.body.layer, layer, self.tracer.accessed, self._lifted())
        self._check_identity(same)
        self._check_memory(same, (*self.body.args, *arguments.nodes))
        if self.seen.foreign:
            self._check_lookups(same)
        call = Call(self.body, source, same.tensors)
        for node, what in self.body.inputs.items():
            if isinstance(what, Opaque):
                args = tuple(
                    same.names.get(arg, arg) if origin is not None and type(arg) is str else arg
                    for arg, origin in zip(what.args, what.origins, strict=True)
                )
                if args != what.args:
                    call.lifted[node] = args
        return call

    def _lifted(self) -> set[tuple[int, str]]:
        """(id of owner, step) of each string that only went into an opaque object's constructor."""
        found = [origin for what in self.opaque for origin in what.origins if origin is not None]
        origins = {(id(owner), f".{key}") for owner, key in found}
        keys = {key for _, key in found}
        looked_at = set(self.tx.output.root_tracer.traced_sources)
        looked_at |= {g.originating_source for g in kinds.guards(self.tx) if g.create_fn_name() != "TYPE_MATCH"}
        for source in looked_at:
            base, key = kinds.last_step(source)
            if key in keys:
                origins.discard((id(resolve(self.tx, base, watch.UNKNOWN)), f".{key}"))
        return origins

    def _check_identity(self, same: Same) -> None:
        """Raises `NotOnce` where it may tell which objects the layer's own ones are."""
        for one, other in self.seen.identities:
            if all(value is watch.UNKNOWN or same.holds(value) for value in (one, other)):
                raise NotOnce("the trace depends on which object something is")
        if not same.own.keys().isdisjoint(same.counterparts):
            raise NotOnce("a part of one layer is a part of the other, in another place")
        accessed, tables = self.tracer.accessed, self.tracer.tables
        if self.outside is None or self.changes != accessed.changes:
            self.reached, self.changes = {}, accessed.changes
            self.outside = Reach(accessed, tables, (v for v in self.seen.roots() if id(v) not in same.own))
        for value in same.shared:
            if id(value) not in self.reached:
                self.reached[id(value)] = Reach(accessed, tables, [value])
        parts = {**same.counterparts, **same.own}
        for reach in (self.outside, *(self.reached[id(value)] for value in same.shared)):
            if not reach.ids.isdisjoint(parts):
                name = next(type(parts[part]).__qualname__ for part in (*same.own, *parts) if part in reach.ids)
                raise NotOnce(f"something outside of the layer holds a part of it, a {name}")

    def _check_memory(self, same: Same, arguments: Iterable[fx.Node]) -> None:
        """Raises `NotOnce` where one of the layer's own tensors shares memory with a tensor that is not its own: then
        the layers' graphs differ in what overlaps."""
        real = self.tracer.memory_of_inputs(self.tx)
        given = {real[key] for n in arguments if (key := storage(n)) in real}
        reached: dict[int, set[int]] = collections.defaultdict(set)
        assert self.outside is not None
        for tensor in self.outside.tensors.values():
            reached[storage_of(tensor)].add(id(tensor))
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
            table = resolve(self.tx, base, watch.UNKNOWN)
            if not any(table is t for t in self.tracer.tables):
                continue
            if key not in same.names or same.own.get(id(table.get(key)), table) is not table.get(same.names[key]):
                raise NotOnce(f"{source.name} is found by the layer's name, and is no part of the layer")
            found += 1
        if not found:
            raise NotOnce("a function reads the layer's name")


# What a tensor from outside may have, and one that the trace made has not.
_ONLY_OUTSIDE = {"_base", "_is_view", "_version", "is_inference", "is_leaf", "grad", "grad_fn", "data_ptr", "is_shared"}


def _check_like_made(tensor: torch.Tensor, accessed: Accessed) -> None:
    """Raises `NotOnce` where the traced code may tell an argument from outside from one that the trace made: the first
    layer often gets the former, the others the latter."""
    said = sorted(_ONLY_OUTSIDE & accessed.said)
    own = [k for k, _ in accessed.select(torch.nn.Parameter, vars(tensor)) if not k.startswith("_dynamo")]
    if said or own or type(tensor) is not torch.Tensor:
        raise NotOnce(f"an argument is from outside, and code reads {', '.join([*said, *own]) or 'its class'}")


def _describe_tensors(nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
    """What is known of tensors from outside of a body; `t_()` and the like change it."""
    return {n: metadata(value) for n in nodes if isinstance(value := value_of(n), torch.Tensor)}


def _is_changed(tx: Any, node: fx.Node) -> bool:
    """Whether a graph input that a body was the first to read is no longer as it was."""
    fake = value_of(node)
    if node.op != "placeholder" or not isinstance(fake, torch.Tensor) or fake.layout != torch.strided:
        return False
    real = resolve(tx, _source(node))
    if not isinstance(real, torch.Tensor):  # numpy's, of which nothing can be changed in place
        return False
    sizes = (*fake.shape, *fake.stride(), fake.storage_offset())
    symbolic = any(isinstance(size, torch.SymInt) for size in sizes)
    return not symbolic and sizes != (*real.shape, *real.stride(), real.storage_offset())


def _source(node: fx.Node) -> Any:
    """The source of a graph input."""
    return getattr(node.meta.get("grapharg"), "source", None)


def _classify(tx: Any, node: fx.Node, new: bool) -> torch.Tensor | Opaque | None:
    """What a copy of a body reads in place of `node`, an input of it.  `new`: the body is the first to read it."""
    from torch._dynamo.source import SyntheticLocalSource

    if node.op != "placeholder":
        return None
    if isinstance(value_of(node), int | float | bool | torch.SymInt | torch.SymFloat):
        if new:
            raise NotOnce(f"reads a number that is a graph input, {node.name}")
        return None
    source = _source(node)
    if source is None:
        raise NotOnce(f"input {node.name} has no access expression")
    if isinstance(source, SyntheticLocalSource):
        ctor, args, sources = tx.output.synthetic_source_ctor_info[source]
        return _opaque(tx, ctor, args, sources or [None] * len(args))
    value = resolve(tx, source, watch.UNKNOWN)
    if value is watch.UNKNOWN:
        raise NotOnce(f"input {node.name} cannot be found by its expression")
    if isinstance(value, torch.Tensor):
        return value
    if new:
        raise NotOnce(f"reads a {type(value).__name__} that is a graph input")
    return None


def _unused_opaque(tx: Any, variable: Any) -> Opaque | None:
    """An opaque object that tracing made, and that need not have become a graph input."""
    real = variable.realize()
    sources, given = getattr(real, "ctor_arg_sources", None), getattr(real, "ctor_args_kwargs", None)
    if not sources or not given or given[1]:
        return None
    return _opaque(tx, type(getattr(real.value, "real_obj", real.value)), given[0], sources)


def _opaque(tx: Any, ctor: Any, args: Iterable[Any], sources: Iterable[Any]) -> Opaque:
    steps = [(None, None) if source is None else kinds.last_step(source) for source in sources]
    origins = (None if base is None else (tx.output.resolve_source_value(base), key) for base, key in steps)
    return Opaque(ctor, tuple(args), tuple(origins))


def _stamp(tx: Any, call: Call, arguments: Arguments) -> Any:
    """Add the marker node of `call` to the graph; the variable of its result."""
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.builder import wrap_fx_proxy

    proxies = tuple(fx.Proxy(n, tx.output.root_tracer) for n in arguments.nodes)
    marker = tx.output.create_proxy("call_function", region, proxies, {})
    marker.node.meta[CALL] = call
    results = call.body.results
    with tx.fake_mode:
        fakes = [value_of(node) for node in results]
        values = [torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device=f.device) for f in fakes]
    marker.node.meta["example_value"] = tuple(values)
    made = {}
    for i, (node, value) in enumerate(zip(results, values, strict=True)):
        item = tx.output.create_proxy("call_function", operator.getitem, (marker, i), {})
        made[node] = wrap_fx_proxy(tx, item, example_value=value)

    def build(output: Any) -> Any:
        kind, value, *items = output
        if kind == "arg":
            return arguments.variables[value]
        if kind == "node":
            return made[value]
        if kind == "const":
            return ConstantVariable.create(value)
        return value([build(item) for item in items[0]])

    return build(call.body.outputs)
