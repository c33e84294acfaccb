"""Everything that the plugin changes outside its own modules, in one table, each with its undo.

The import hook of `vllm_compile_ext.swap` is the first line of the table; `docs/changes.md` is made from it.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_compile_ext import jit_caches, platforms, run_folder, settings, swap
from vllm_compile_ext.compilation import functions
from vllm_compile_ext.cuda_graphs import install as cudagraphs
from vllm_compile_ext.inductor import late_patterns
from vllm_compile_ext.record import metrics

Undo = Callable[[], None]


@dataclass(frozen=True)
class Change:
    """One change to global state: what is changed, why, and the function that makes it and returns its undo."""

    what: str
    why: str
    make: Callable[[], Undo]


def _swap() -> Undo:
    swap.install()
    return swap.uninstall


def _instruction_set() -> Undo:
    # Made in the background when a model is constructed (inductor/workers.py): torch is not imported yet.
    def undo() -> None:
        workers = sys.modules.get("vllm_compile_ext.inductor.workers")
        if workers is not None:
            workers.forget()

    return undo


def _record() -> Undo:
    if not settings.load().VLLM_COMPILE_STARTS:
        return _forget()
    from vllm_compile_ext import plugin
    from vllm_compile_ext.record import hooks

    return hooks.install(plugin.loading_since or time.time_ns())


def _forget() -> Undo:
    """Drop what the file vllm_compile_ext.pth has begun in this process."""
    imports = sys.modules.get("vllm_compile_ext.record.imports")
    if imports is not None and imports.observer is not None:
        from vllm_compile_ext.record import hooks

        hooks.uninstall()
    return lambda: None


def _logger() -> Undo:
    ours, theirs = logging.getLogger("vllm_compile_ext"), logging.getLogger("vllm")
    before = ours.parent
    ours.parent = theirs

    def undo() -> None:
        ours.parent = before

    return undo


def _late_line() -> Undo:
    import vllm.logger

    from vllm_compile_ext import plugin

    upstream = vllm.logger.configure_logging

    def configure_logging(config: Any) -> None:
        upstream(config)
        plugin.announce()

    vllm.logger.configure_logging = configure_logging

    def undo() -> None:
        vllm.logger.configure_logging = upstream

    return undo


def _variables() -> Undo:
    import vllm.envs

    def getter(name: str) -> Callable[[], Any]:
        def get() -> Any:
            try:
                return getattr(settings.load(), name)
            except settings.EnvError:  # reported by the plugin; vLLM reads all variables at once and must not fail here
                return os.environ.get(name)

        return get

    known = vllm.envs.environment_variables
    added = [row.name for row in settings.table() if row.name not in known]
    known.update({name: getter(name) for name in added})

    def undo() -> None:
        for name in added:
            del known[name]

    return undo


def _cache_key(*, active: bool) -> Undo:
    import vllm.envs

    from vllm_compile_ext import __version__

    upstream = vllm.envs.compile_factors
    dropped = [row.name for row in settings.table() if not row.in_key]

    def compile_factors() -> dict[str, object]:
        factors: dict[str, object] = {k: v for k, v in upstream().items() if k not in dropped}
        if active:
            factors["vllm_compile_ext"] = __version__
        return factors

    vllm.envs.compile_factors = compile_factors

    def undo() -> None:
        vllm.envs.compile_factors = upstream

    return undo


def _metrics() -> Undo:
    metrics.expose()
    return metrics.conceal


# Made also when the plugin is switched off, so that its variables are no news to vLLM and leave its cache key alone.
ALWAYS = (
    Change("logging.getLogger('vllm_compile_ext').parent", "our lines go where vLLM's go, in vLLM's format", _logger),
    Change(
        "vllm.logger.configure_logging",
        "vLLM's front end loads plugins before it sets up logging: the plugin's line is said right after",
        _late_line,
    ),
    Change("vllm.envs.environment_variables", "vLLM warns of VLLM_* variables that it does not know", _variables),
)
OFF = (
    *ALWAYS,
    Change(
        "vllm.envs.compile_factors",
        "our variables must not change the compile cache key of stock vLLM",
        lambda: _cache_key(active=False),
    ),
    Change(
        "os.environ: variables of JIT caches",
        "where the plugin is off, what a parent process with the plugin set of them is taken away",
        lambda: jit_caches.settle(active=False),
    ),
    Change("sys.meta_path (off)", "a record of imports that began before the plugin was loaded is dropped", _forget),
)
ACTIVE = (
    *ALWAYS,
    Change(
        "vllm.envs.compile_factors",
        "variables that cannot change compiled code stay out of the compile cache key; the plugin's version goes in, "
        "so that stock's entries are neither read nor overwritten",
        lambda: _cache_key(active=True),
    ),
    Change(
        "vllm.platforms.cpu.CpuPlatform.check_and_update_config",
        "the compilation mode that the user asked for survives on CPU",
        platforms.keep_mode_on_cpu,
    ),
    Change(
        f"os.environ: {', '.join(cache.variable for cache in jit_caches.CACHES)}",
        "kernels that are compiled while serving starts are kept in one place under the store, where the next start "
        "finds them; what the user set stays, and with VLLM_DISABLE_COMPILE_CACHE=1 nothing is set (jit_caches.py)",
        lambda: jit_caches.settle(active=True),
    ),
    Change(
        f"os.environ: {run_folder.VARIABLE}",
        "names the private temporary folder that the front end makes for itself, the engine and the workers",
        run_folder.make,
    ),
    Change(
        "prometheus_client.REGISTRY; prometheus_client.multiprocess.MultiProcessCollector.collect",
        "the plugin's metrics are at /metrics, with one API server and with several; changed when they are imported",
        _metrics,
    ),
    Change("sys.meta_path", "the import hook that swaps vllm.compilation's modules", _swap),
    Change(
        "gc.freeze()",
        "called where vLLM's models are defined (compilation/decorators.py): what the imports made is not looked at "
        "again each time that vLLM collects garbage while it starts",
        lambda: gc.unfreeze,
    ),
    Change(
        "vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager and profile_cudagraph_memory, "
        "capture_model of the GPUModelRunner of vllm.v1.worker.gpu.model_runner and vllm.v1.worker.gpu_model_runner, "
        "vllm.v1.engine.core.EngineCoreProc._notify_idle_state_callbacks",
        "CUDA graphs are captured on demand; made when these modules are imported, and only with CUDA "
        "(cuda_graphs/install.py)",
        cudagraphs.install,
    ),
    Change(
        "vllm.compilation.compiler_interface.trigger_inductor_lazy_init",
        "Inductor's patterns are made by the first compilation, which a start that loads its code does not have; with "
        "VLLM_GPU_SYNC_CHECK at the start, as in stock vLLM",
        late_patterns.install,
    ),
    Change(
        "torch._TorchCompileInductorWrapper.__call__",
        "functions that vLLM compiles beside the model are looked up in the store and kept there; without a C++ "
        "compiler they run uncompiled; made when torch is imported (compilation/functions.py)",
        functions.install,
    ),
    Change(
        "torch._inductor.cpu_vec_isa.valid_vec_isa_list",
        "on CPU, one instruction set is probed instead of all that the processor names",
        _instruction_set,
    ),
    Change(
        "sys.meta_path (record/imports.py)",
        "while a start is recorded: imports are timed, and functions of vLLM are found when their module is imported",
        _record,
    ),
)
# What is changed while a model compiles and put back afterwards, by the module that does it.
WHILE_COMPILING = (
    (
        "torch._dynamo.variables: UnspecializedNNModuleVariable.call_function, and what else trace/watch.py lists",
        "a repeated layer is traced once",
    ),
    (
        "torch._inductor.async_compile.AsyncCompile.cpp_pybinding (inductor/workers.py)",
        "C++ kernels compile in threads",
    ),
    (
        "hash_factors and safe_hash in the modules of vllm.config (key/config.py)",
        "what vLLM hashes of its configuration is noted, field by field, so that a miss can name what changed",
    ),
    (
        "torch._inductor.config.compile_threads and worker_start_method (inductor/workers.py)",
        "on GPUs, Triton kernels compile in Inductor's own pool of processes",
    ),
)
# What is changed while a CUDA graph is captured on demand (cuda_graphs/capture.py and addresses.py).
WHILE_CAPTURING = (
    (
        "torch.cuda.graph, torch.cuda.empty_cache, torch._C._host_emptyCache; graph_capture, prepare_inputs_to_capture "
        "and tqdm of vllm.v1.worker.gpu.cudagraph_utils; vllm.compilation.monitor.cudagraph_capturing_enabled",
        "other threads may go on, caches of memory stay, one stream serves all captures, attention beside a graph "
        "takes less memory; vLLM's guard against captures is open only then",
    ),
    (
        "_IS_CAPTURING and _capture_registered of vLLM's CustomAllreduce, register_graph_buffers of vllm._custom_ops "
        "(cuda_graphs/addresses.py)",
        "all-reduce reads inputs where they are; a capture that broke off on some rank leaves no address open",
    ),
)
# What is changed while a start is recorded, by the module that does it.
WHILE_STARTING = (
    (
        "trace and TracerProvider in vllm.tracing.otel (record/otel.py)",
        "vLLM's own spans go to our provider, which writes the file of the start",
    ),
    ("os.environ: traceparent (record/recorder.py)", "vLLM's spans find what they are part of; until ready"),
    (
        "functions of vLLM, listed in record/hooks.py",
        "phases that vLLM has no span for get one; the first request and its first token are seen",
    ),
)
# What the command's own processes change for as long as they live (cli/warm_start.py).
WHILE_WARMING = (
    (
        "vllm.v1.core.kv_cache_utils.get_kv_cache_configs",
        "the engine that is started to be compiled has a small KV cache",
    ),
)


def make(changes: tuple[Change, ...]) -> list[Undo]:
    """Make `changes` in order and return their undos; when one fails, the ones before it are undone and it raises."""
    undos: list[Undo] = []
    try:
        for change in changes:
            undos.append(change.make())
    except BaseException:
        undo(undos)
        raise
    return undos


def undo(undos: list[Undo]) -> None:
    """Undo in reverse order and empty the list."""
    while undos:
        undos.pop()()


def markdown() -> str:
    """The table as the docs page."""
    head = (
        "# What the plugin changes outside its own modules\n\n"
        "Made by `python -m vllm_compile_ext.monkeypatches` from `vllm_compile_ext/monkeypatches.py`; do not edit.\n\n"
        "`vllm_compile_ext.plugin.unregister` undoes each; tests use it. Switched off (`VLLM_COMPILE_EXT=0`), or where "
        'it cannot take over, the plugin makes only those marked "active or off".\n'
    )
    rows = [f"| active or off | `{change.what}` | {change.why} |" for change in OFF]
    rows += [f"| active | `{change.what}` | {change.why} |" for change in ACTIVE if change not in ALWAYS]
    rows += [f"| while a model compiles | `{what}` | {why} |" for what, why in WHILE_COMPILING]
    rows += [f"| while a graph is captured | `{what}` | {why} |" for what, why in WHILE_CAPTURING]
    rows += [f"| while a start is recorded | `{what}` | {why} |" for what, why in WHILE_STARTING]
    rows += [f"| in `vllm-compile-ext warm` | `{what}` | {why} |" for what, why in WHILE_WARMING]
    return "\n".join([head, "| when | what | why |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
