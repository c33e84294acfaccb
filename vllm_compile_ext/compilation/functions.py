"""Functions that vLLM compiles with `torch.compile` beside the models: kept in the store as a model's pieces are.

vLLM counts the ranks of log-probabilities that way, samples, routes tokens to experts, ...: each is compiled when it is
first called, in every start and often by a request.  Here such a graph is looked up first.  What is found is mapped and
asks no compiler for anything; what is not found is compiled as ever and kept; and where there is no C++ compiler it
runs as it is, as under the backend "eager".

A graph belongs to the programs that this process has loaded or compiled.  Their keys say what the machine and the
software are; `_key` adds the graph, and what is switched in torch now.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from vllm_compile_ext import after_import, harmless, platforms
from vllm_compile_ext.record import metrics

logger = logging.getLogger(__name__)

SHARD = "function"  # and, after a dot, the digest of the guards that compiling has brought

_models: dict[str, str] = {}  # key of each program of this process -> its model, for people


def belong_to(key: str, model: str) -> None:
    """From now on functions are kept for the program `key`, too."""
    _models[key] = model


def install() -> Callable[[], None]:
    """Change torch when it is imported."""
    undo = after_import.install({"torch": _change})

    def forget() -> None:
        undo()
        _models.clear()

    return forget


def _change(torch: ModuleType) -> Callable[[], None]:
    wrapper = torch._TorchCompileInductorWrapper

    def around(stock: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, graph: Any, inputs: Any, *, config_patches: Any = None) -> Any:  # noqa: N807
            compile_it = functools.partial(stock, self, graph, inputs, config_patches=config_patches)
            if type(self) is not wrapper or torch._functorch.config.bypass_autograd_cache_key:
                return compile_it()  # to be saved ahead of time, by who asks for it
            plain = not config_patches and not self.name
            return _compiled(compile_it, graph, inputs, self.config if plain else None)

        return __call__

    return after_import.replace(wrapper, "__call__", around)


def _compiled(compile_it: Callable[[], Any], graph: Any, inputs: Sequence[Any], options: Any) -> Any:
    """What Dynamo calls for `graph`.  options: of `torch.compile`, None where there are some of an unknown kind."""
    import torch

    from vllm_compile_ext.compilation import entry as entries
    from vllm_compile_ext.store.store import key_of

    store = None
    keys: dict[str, str] = {}
    try:
        store = entries.store() if _models and options is not None else None
        if store is not None:
            described = _key(graph, inputs, options)
            keys = {program: key_of({"program": program, "function": described}) for program in _models}
    except Exception as why:  # the graph cannot be told from others
        logger.debug("a function is not kept: %s: %s", type(why).__name__, why)
    for key in keys.values():
        found = _load(store, key, inputs)
        if found is not None:
            return found
    if _has_no_compiler():
        _say_uncompiled()
        return graph.forward
    metrics.inc("functions_compiled_total")
    if not keys:
        return compile_it()
    with torch._functorch.config.patch(bundled_autograd_cache=True):  # what it returns can be serialized then
        compiled = compile_it()
    _keep(store, keys, compiled)
    return compiled


def _has_no_compiler() -> bool:
    from vllm.platforms import current_platform

    from vllm_compile_ext.key import machine

    return bool(current_platform.is_cpu()) and machine.compiler() == "none"


@functools.cache
def _say_uncompiled() -> None:
    logger.info("there is no C++ compiler: functions that vLLM compiles beside the model run uncompiled")


def _key(graph: Any, inputs: Sequence[Any], options: dict[str, Any]) -> str:
    """A digest of what the code of `graph` depends on, besides what is in the key of a program.

    Raises where that cannot be told, and where the graph is not one that only infers.
    """
    import torch

    from vllm_compile_ext.compilation.entry import device
    from vllm_compile_ext.key import compilers, machine, torch_state
    from vllm_compile_ext.key.dropped import counts
    from vllm_compile_ext.program.pieces import constants
    from vllm_compile_ext.trace.fingerprint import Unfingerprintable, fingerprint
    from vllm_compile_ext.trace.signature import storage
    from vllm_compile_ext.trace.split import Piece

    nodes = list(graph.graph.nodes)
    piece = Piece(False, inputs=graph.graph.find_nodes(op="placeholder"), outputs=list(nodes[-1].args[0]))
    piece.nodes = [node for node in nodes if node.op not in ("placeholder", "output")]
    storages = [found for node in piece.inputs if (found := storage(node)) is not None]
    rules = (
        (torch.is_grad_enabled() and any(getattr(i, "requires_grad", False) for i in inputs), "it is trained"),
        (options.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs), "it replays CUDA graphs"),
        (any(type(v) not in (bool, int, float, str) for v in options.values()), "options of an unknown kind"),
        (constants(graph), "it holds tensors"),
        (len(set(storages)) < len(storages), "inputs share memory"),
        (any("example_value" not in node.meta for node in piece.inputs), "inputs that Dynamo has not described"),
    )
    for applies, why in rules:
        if applies:
            raise Unfingerprintable(why)
    for node in piece.nodes:
        _check_target(node.target)
    state = {f"state.{name}": text for name, text in torch_state.state().items()} | compilers.of_compilers({})
    state |= {"threads": str(machine.threads(options)), "device": device()}
    switched = sorted((name, text) for name, text in state.items() if counts(name))
    return fingerprint(piece, graph, [str(sorted(options.items())), str(switched), *_symbols()])


def _check_target(target: Any) -> None:
    """Raises for what torch's version does not stand for."""
    import torch

    from vllm_compile_ext.trace.fingerprint import Unfingerprintable
    from vllm_compile_ext.trace.values import is_torchs

    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        known = name.startswith(("aten::", "prims::", "prim::"))
    else:
        known = (
            isinstance(target, str)
            or is_torchs(target.__module__)
            or target.__module__ in ("_operator", "math", "builtins")
        )
    if not known:
        raise Unfingerprintable(f"it calls {target}")


def _symbols() -> Iterator[str]:
    """What the trace knows of its symbols, by their own names: they stand in the graph only as sizes."""
    import torch
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


def _load(store: Any, key: str, inputs: Sequence[Any]) -> Callable[..., Any] | None:
    """The function of which `key` is the key, when the store has it and it is good for `inputs`."""
    from vllm_compile_ext.program import program
    from vllm_compile_ext.store.store import total

    try:
        for manifest in store.variants(key, SHARD):
            found = program.get_piece(store, manifest.members["code"])
            if _hold(store.get(manifest.members["guards"]).decode(), inputs):
                store.use(manifest)
                metrics.inc("functions_loaded_total")
                metrics.inc("store_loaded_bytes_total", total(manifest.members.values()))
                logger.debug("loaded function %s of %s", key[:12], store.root)
                return found
    except Exception as error:  # whatever it is, compiling it is the way out
        logger.warning("compiling a function again: %s", harmless.error(error))
    return None


def _hold(guards: str, inputs: Sequence[Any]) -> bool:
    """Whether what compiling has assumed of sizes is so; then Dynamo guards it (torch 2.13.0, as its own caches do:
    `_functorch/_aot_autograd/autograd_cache.py`, "Caching guards generated by AOTAutograd and Inductor").
    """
    import torch
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    if not guards:
        return True
    env = torch._guards.TracingContext.get().fake_mode.shape_env
    return bool(env.evaluate_guards_expression(guards, AOTAutogradCache._filter_backed_symints(inputs)))


def _keep(store: Any, keys: dict[str, str], compiled: Any) -> None:
    """Write a function that was compiled here; a failure is no error."""
    import torch
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    from vllm_compile_ext.program import program
    from vllm_compile_ext.store import evict
    from vllm_compile_ext.store.store import Manifest, digest, total

    if not store.writable:
        return
    try:
        if torch._guards.TracingContext.get().guards_context.aotautograd_guards:
            raise ValueError("it is guarded by more than sizes")
        guards = compiled.serialize().guards_expr or ""
        for program_key, key in keys.items():
            with store.writer(key, 0) as mine:
                if not mine:
                    continue
                made = Manifest(
                    kind="piece",
                    key=key,
                    shard=f"{SHARD}.{digest(guards.encode())[:8]}",
                    model=_models[program_key],
                    created=time.time(),
                    platform=platforms.name(),
                    factors={"program": program_key},
                    members=program.put_artifact(store, AOTCompiledArtifact(compiled))
                    | {"guards": store.put(guards.encode())},
                )
                store.commit(made)
                metrics.inc("store_kept_bytes_total", total(made.members.values()))
                logger.debug("kept function %s in %s", key[:12], store.root)
        evict.keep_limit(store)
    except Exception as error:
        logger.debug("a function is not kept: %s: %s", type(error).__name__, error)
