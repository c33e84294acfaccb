"""Functions that vLLM compiles with `torch.compile` beside the models: kept in the store as a model's pieces are.

vLLM counts the ranks of log-probabilities that way, samples, routes tokens to experts, ...: each is compiled when it is
first called, in every start and often by a request.  Here such a graph is looked up first.  What is found is mapped and
asks no compiler for anything; what is not found is compiled as ever and kept; and where there is no C++ compiler it
runs as it is, as under the backend "eager".

A graph belongs to the programs that this process has loaded or compiled.  Their keys say what the machine and the
software are; `_describe` adds the graph, and what is switched in torch now.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_compile_ext import harmless
from vllm_compile_ext.key import machine, torch_settings
from vllm_compile_ext.key.factors import EXCLUDED
from vllm_compile_ext.key.seen import foreign_operator
from vllm_compile_ext.program import commit, open_store, program
from vllm_compile_ext.program.piece import constants
from vllm_compile_ext.record.events import event
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.store import Store, digest, key_of, total
from vllm_compile_ext.trace.call import storage
from vllm_compile_ext.trace.fingerprint import Unfingerprintable, fingerprint
from vllm_compile_ext.trace.split import Piece
from vllm_compile_ext.trace.values import is_torchs

logger = logging.getLogger(__name__)

SHARD = "function"  # and, after a dot, the digest of the guards that compiling has brought

_models: dict[str, str] = {}  # key of each program of this process -> its model, for people


def keep_for(key: str, model: str) -> None:
    """From now on functions are kept for the program `key`, too."""
    _models[key] = model


def load_or_compile(
    compile_it: Callable[[], Any], graph: Any, inputs: Sequence[Any], options: Mapping[str, Any] | None
) -> Any:
    """What Dynamo calls for `graph`.  options: of `torch.compile`, None where there are some of an unknown kind."""
    store, keys = None, dict[str, str]()
    try:
        store = open_store() if _models and options is not None else None
        if store is not None and options is not None:
            described = _describe(graph, inputs, options)
            keys = {owner: key_of({"program": owner, "function": described}) for owner in _models}
    except Exception as why:  # the graph cannot be told from others
        logger.debug("a function is not kept: %s: %s", type(why).__name__, why)
    for key in keys.values():
        if store is not None and (found := _load(store, key, inputs)) is not None:
            return found
    if current_platform.is_cpu() and machine.compiler() == "none":
        _say_uncompiled()
        return graph.forward
    event("function compiled", "compiled a function beside the model", level=logging.DEBUG)
    if store is None or not keys:
        return compile_it()
    with torch._functorch.config.patch(bundled_autograd_cache=True):  # what it returns can be serialized then
        compiled = compile_it()
    _keep(store, keys, compiled)
    return compiled


@functools.cache
def _say_uncompiled() -> None:
    logger.info("there is no C++ compiler: functions that vLLM compiles beside the model run uncompiled")


def _describe(graph: Any, inputs: Sequence[Any], options: Mapping[str, Any]) -> str:
    """A digest of what the code of `graph` depends on, besides what is in the key of a program.

    Raises where that cannot be told, and where the graph is not one that only infers.
    """
    nodes = list(graph.graph.nodes)
    piece = Piece(False, inputs=graph.graph.find_nodes(op="placeholder"), outputs=list(nodes[-1].args[0]))
    piece.nodes = [node for node in nodes if node.op not in ("placeholder", "output")]
    storages = [found for node in piece.inputs if (found := storage(node)) is not None]
    unknown = [str(node.target) for node in piece.nodes if not _is_torchs(node.target)]
    rules = (
        (torch.is_grad_enabled() and any(getattr(i, "requires_grad", False) for i in inputs), "it is trained"),
        (options.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs), "it replays CUDA graphs"),
        (any(type(v) not in (bool, int, float, str) for v in options.values()), "options of an unknown kind"),
        (constants(graph), "it holds tensors"),
        (len(set(storages)) < len(storages), "inputs share memory"),
        (any("example_value" not in node.meta for node in piece.inputs), "inputs that Dynamo has not described"),
        (unknown, f"it calls {unknown[:1]}"),
    )
    for applies, why in rules:
        if applies:
            raise Unfingerprintable(why)
    state = {f"state.{name}": text for name, text in torch_settings.state().items()} | torch_settings.compilers({})
    state |= {"threads": str(machine.threads(options)), "device": machine.device()}
    switched = sorted((name, text) for name, text in state.items() if name not in EXCLUDED)
    return fingerprint(piece, graph, [str(sorted(options.items())), str(switched), *_symbols()])


def _is_torchs(target: Any) -> bool:
    """Whether torch's version stands for what a node calls."""
    if isinstance(target, str | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return foreign_operator(target) is None
    return is_torchs(target.__module__) or target.__module__ in ("_operator", "math", "builtins")


def _symbols() -> Iterator[str]:
    """What the trace knows of its symbols, by their own names: they stand in the graph only as sizes."""
    from sympy import srepr

    env = torch._guards.TracingContext.get().fake_mode.shape_env
    yield f"settings {env.settings}"
    yield f"guards {[srepr(guard.expr) for guard in env.guards]}"
    for name, table in (
        ("ranges", {symbol: [bounds.lower, bounds.upper] for symbol, bounds in env.var_to_range.items()}),
        ("equal", {symbol: [other] for symbol, other in env.replacements.items()}),
        ("asserted", {symbol: [one.expr for one in all_] for symbol, all_ in env.deferred_runtime_asserts.items()}),
        ("sizes", {symbol: [] for symbol in env.size_like}),
    ):
        yield f"{name} {sorted((str(key), [srepr(value) for value in values]) for key, values in table.items())}"


def _load(store: Store, key: str, inputs: Sequence[Any]) -> Callable[..., Any] | None:
    """The function of which `key` is the key, when the store has it and it is good for `inputs`."""
    try:
        for manifest in store.variants(key, SHARD):
            found = program.load_code(store, manifest.members["code"])
            if _guards_hold(store.get(manifest.members["guards"]).decode(), inputs):
                store.use(manifest)
                line = f"loaded function {key[:12]} of {store.root}"
                event("function loaded", line, level=logging.DEBUG, bytes=total(manifest.members.values()))
                return found
    except Exception as error:  # whatever it is, compiling it is the way out
        logger.warning("compiling a function again: %s", harmless.error(error))
    return None


def _guards_hold(guards: str, inputs: Sequence[Any]) -> bool:
    """Whether what compiling has assumed of sizes is so; then Dynamo guards it (torch 2.13.0, as its own caches do:
    `_functorch/_aot_autograd/autograd_cache.py`, "Caching guards generated by AOTAutograd and Inductor").
    """
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    if not guards:
        return True
    env = torch._guards.TracingContext.get().fake_mode.shape_env
    return bool(env.evaluate_guards_expression(guards, AOTAutogradCache._filter_backed_symints(inputs)))


def _keep(store: Store, keys: Mapping[str, str], compiled: Any) -> None:
    """Write a function that was compiled here; a failure is no error."""
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    if not store.writable:
        return
    try:
        if torch._guards.TracingContext.get().guards_context.aotautograd_guards:
            raise ValueError("it is guarded by more than sizes")
        guards = (compiled.serialize().guards_expr or "").encode()
        shard = f"{SHARD}.{digest(guards)[:8]}"
        for owner, key in keys.items():
            with store.writer(key, 0) as mine:
                if not mine:
                    continue
                members = program.keep_code(store, AOTCompiledArtifact(compiled), (), "code")
                members["guards"] = store.put(guards)
                about = {"model": _models[owner], "factors": {"program": owner}}
                commit(store, kind="piece", key=key, shard=shard, members=members, **about)
                line = f"kept function {key[:12]} in {store.root}"
                event("function kept", line, level=logging.DEBUG, bytes=total(members.values()))
        evict.keep_limit(store)
    except Exception as error:
        logger.debug("a function is not kept: %s: %s", type(error).__name__, error)
