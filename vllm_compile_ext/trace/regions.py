"""Trace once: a repeated layer is traced one time a kind, and later calls of its kind become one node each.

`Tracer.install()` listens while Dynamo traces.  The first call of a kind is traced inline, as always; what it added to
the graph is its *body*.  A later call of a sibling of the same kind only adds a marker node, which `stitch` replaces by
a copy of the body with that layer's own tensors.  Siblings are children of one ModuleList with `least` or more of their
class.  They are the same kind when

* the calls have the same signature (signature.py), under the same state of torch and of Python (state.py);
* everything reachable from the two layers agrees (structure.py), but for what tracing did not read (reads.py) and for
  strings that only went into the constructor of an opaque graph input, a layer name.

Everything else is traced as Dynamo does it, and `Tracer.reasons` says why.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext.trace import hooks
from vllm_compile_ext.trace.bodies import CALL, UNKNOWN, Body, Call, Foreign, NotOnce, Opaque, Read, keep_alive, region
from vllm_compile_ext.trace.reads import check, guards, identities, lifted_strings, reads, renamed, split_source
from vllm_compile_ext.trace.signature import Arguments, check_returned, first_difference, results, returned
from vllm_compile_ext.trace.state import Snapshot
from vllm_compile_ext.trace.structure import Comparison, Unlike, compare


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

    `lookups`: functions that run while tracing (`assume_constant_result`) and make a string of a layer-name object,
    which the model uses for nothing but to find the layer in a dict.  By default there are none.
    """

    def __init__(self, root: torch.nn.Module, least: int = 3, lookups: Collection[Callable[..., Any]] = ()) -> None:
        self.root = root
        self.groups = find_groups(root, least)
        self.lookups = lookups
        self.reasons: list[str] = []
        self._restart(None)

    def _restart(self, output: Any) -> None:
        self._output = output
        self._bodies: dict[tuple[int, type], list[_Traced]] = {}
        self._inside = False
        self._foreign: list[Foreign] = []
        self.traced = 0
        self.stamped = 0

    @contextlib.contextmanager
    def install(self) -> Iterator[None]:
        """Listen to what Dynamo traces on this thread.  Leaves no trace of itself, however it ends."""
        with hooks.listening(self):
            yield
        self._output = None  # a capture's graph is the caller's: do not keep it alive

    def on_foreign(self, fn: Callable[..., Any], args: list[Any]) -> None:
        """A function runs while tracing and may read anything of `args`, which are Dynamo's variables."""
        self._foreign.append(Foreign(fn, [_known(a) for a in args], args))

    def on_call(self, module: Any, tx: Any, args: list[Any], kwargs: dict[str, Any], trace: Callable[[], Any]) -> Any:
        """Dynamo is about to trace a call of an nn.Module; `trace` does it."""
        layer = module.value
        if self._output is not tx.output:  # another frame, or Dynamo started over
            self._restart(tx.output)
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
        for body in family:
            try:
                call = body.call(layer, module.source.name, arguments, state)
            except (Unlike, NotOnce) as why:
                self.reasons.append(f"{name}: {why}")
                continue
            self.stamped += 1
            return _stamp(tx, call, arguments)
        self.traced += 1
        return self._record(tx, family, module, arguments, state, trace)

    def _record(
        self,
        tx: Any,
        family: list[_Traced],
        module: Any,
        arguments: Arguments,
        state: Snapshot,
        trace: Callable[[], Any],
    ) -> Any:
        before, guarded = set(tx.output.graph.nodes), guards(tx)
        tracer = tx.output.root_tracer
        outer, tracer.traced_sources = tracer.traced_sources, type(tracer.traced_sources)()
        self._inside, self._foreign = True, []
        try:
            result = trace()
        finally:
            self._inside = False
            sources, tracer.traced_sources = tracer.traced_sources, outer
            outer.update(sources)
        try:
            after = Snapshot(tx)
            if after != state:
                raise NotOnce(f"changes Python's state: {after.since(state)}")
            new = [n for n in tx.output.graph.nodes if n not in before and n.op != "placeholder"]
            traced = _Traced(tx, module, arguments, state, new, before, set(sources), guards(tx) - guarded)
            traced.foreign, traced.lookups = self._foreign, self.lookups
            opaque = [o for f in self._foreign for v in f.variables if (o := _unused(tx, v)) is not None]
            traced.finish(tx, result, opaque)
            family.append(traced)
        except NotOnce as why:
            self.reasons.append(f"{module.source.name}: {why}")
        return result


class _Traced:
    """A body, and what decides who may share it."""

    def __init__(
        self,
        tx: Any,
        module: Any,
        arguments: Arguments,
        state: Snapshot,
        nodes: list[fx.Node],
        before: set[fx.Node],
        sources: set[Any],
        added: set[Any],
    ) -> None:
        found = reads(tx, sources, {g.originating_source for g in added})
        self.before = before
        self.foreign: list[Foreign] = []
        self.lookups: Collection[Callable[..., Any]] = ()
        self.identities = identities(tx, added)
        self.body = Body(module.value, arguments.signature, nodes, arguments.nodes, found, state)
        for variable in arguments.variables:
            if variable.source is not None and (name := _read_below(variable.source, sources)):
                raise NotOnce(f"reads {name} of an argument")

    def finish(self, tx: Any, result: Any, opaque: list[Opaque]) -> None:
        """Describe results and inputs.  `opaque`: what functions got that ran while tracing, graph inputs or not.

        Raises `NotOnce` when copies cannot have their like.
        """
        body = self.body
        inside = set(body.nodes)
        body.outputs = results(result, inside, body.args)
        for node in body.nodes:
            for source in node.all_input_nodes:
                if source not in inside and source not in body.args and source not in body.inputs:
                    body.inputs[source] = _classify(tx, source, source not in self.before)
        outs = returned(body.outputs)
        check_returned(outs, [*body.args, *body.inputs])
        _check_symbols(body)
        self.opaque = [*opaque, *(w for w in body.inputs.values() if isinstance(w, Opaque))]
        self.lifted = lifted_strings(self.opaque, body.reads, self._guarded(tx, self.opaque))
        tracer = tx.output.root_tracer
        tx.output.create_proxy("call_function", keep_alive, tuple(fx.Proxy(n, tracer) for n in outs), {})

    @staticmethod
    def _guarded(tx: Any, inputs: Any) -> list[Read]:
        """Reads that any guard depends on, of the keys that matter for opaque `inputs` (there are many guards)."""
        keys = {o[1] for i in inputs if isinstance(i, Opaque) for o in i.origins if o is not None}
        if not keys:
            return []
        sources = {g.originating_source for g in guards(tx)}
        return reads(tx, {s for s in sources if split_source(s)[1] in keys})

    def call(self, layer: torch.nn.Module, source: str, arguments: Arguments, state: Snapshot) -> Call:
        """The call of `layer` as one of this body.  Raises `Unlike` or `NotOnce` unless it is the same kind."""
        body = self.body
        if body.signature != arguments.signature:
            raise NotOnce(f"called differently: {first_difference(body.signature, arguments.signature)}")
        if body.state != state:
            raise NotOnce(f"Python's state has changed: {state.since(body.state)}")
        comparison = compare(body.layer, layer)
        check(body.reads, self.lifted, comparison, renamed(self.foreign, self.opaque, comparison, self.lookups))
        for module in self.identities:
            if id(module) in comparison.pairs:
                raise NotOnce("the trace depends on which object the layer is")
        call = Call(body, layer, source, comparison)
        for node, what in body.inputs.items():
            if isinstance(what, Opaque) and (found := _arguments(what, comparison, source)):
                call.lifted[node] = found
        return call


def _known(variable: Any) -> Any:
    """The value of a constant or an object of the model, `UNKNOWN` for anything else."""
    from torch._dynamo.variables import ConstantVariable, UserDefinedObjectVariable

    real = variable.realize()
    if isinstance(real, ConstantVariable | UserDefinedObjectVariable):
        return getattr(real.value, "real_obj", real.value)
    return UNKNOWN


def _arguments(what: Opaque, comparison: Comparison, source: str) -> tuple[tuple[Any, ...], str] | None:
    """(the constructor's arguments for the other layer, expression of the first that differs), None: the same."""
    args, path = list(what.args), None
    for i, origin in enumerate(what.origins):
        for d in comparison.differences:
            if origin is not None and d.owner is origin[0] and d.key == origin[1]:
                args[i], path = d.right, path or source + d.path
    return None if path is None else (tuple(args), path)


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
    value = tx.output.resolve_source_value(source)
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
    base, key = split_source(source)
    return None if base is None else (tx.output.resolve_source_value(base), key)


def _check_symbols(body: Body) -> None:
    """Raises `NotOnce` when the body makes sizes (`nonzero` and the like do): each copy would need its own."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    values = [n.meta.get("example_value") for n in (*body.args, *body.inputs)]
    known = free_unbacked_symbols([v for v in values if isinstance(v, torch.Tensor | torch.SymInt)])
    for node in body.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor | torch.SymInt) and free_unbacked_symbols(value) - known:
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
