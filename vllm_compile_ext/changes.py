"""Everything that the plugin changes outside its own modules: one table, and how its rows are made and undone.

`docs/changes.md` is made from the table, and the contract test checks each row against the installed vLLM and torch.
No other room is imported before one of its rows is made.
"""

from __future__ import annotations

import logging
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vllm_compile_ext import finder, harmless
from vllm_compile_ext.replace import Undo, replace

logger = logging.getLogger(__name__)

ALWAYS = "active or off"  # also where the plugin is switched off: its variables must be no news to vLLM
OFF = "off"
NOT_RECORDED = "where starts are not recorded"
PATCHED = "in a patched vLLM"
ACTIVE = "active"
STARTING = "while a start is recorded"
# Made by the file that `by` names, for as long as its work lasts.
COMPILING = "while a model compiles"
CAPTURING = "while a graph is captured"
WARMING = "in `vllm-compile-ext warm`"


@dataclass(frozen=True)
class Change:
    """One row of the table.

    module, attribute: what is changed, as soon as the module is imported; `attribute` may have dots.  Where `module` is
    "", `attribute` says in words what of the process is changed.
    by: "room.file:function" of this package.  The function is called with what is there, and returns what takes its
    place; for a change of the process it is called without it, and returns the undo or None.  `given` comes after it.
    """

    when: str
    module: str
    attribute: str
    by: str
    why: str
    given: Sequence[str] = ()

    @property
    def what(self) -> str:
        return f"{self.module}.{self.attribute}" if self.module else self.attribute

    def function(self) -> Callable[..., Any]:
        """What `by` names."""
        found: Callable[..., Any] = pkgutil.resolve_name(f"vllm_compile_ext.{self.by}")
        return found

    def owner(self) -> tuple[Any, str]:
        """The object that has the attribute, and the attribute's own name.

        Imports the module.  Raises `ImportError` or `AttributeError`.
        """
        path, _, name = self.attribute.rpartition(".")
        return pkgutil.resolve_name(f"{self.module}:{path}"), name


_CONFIG = "vllm.config.vllm"
_RUNNER = "vllm.v1.worker.gpu.model_runner"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_PLAN = "vllm.v1.worker.startup_plan"
_GPU, _CPU = "vllm.v1.worker.gpu_worker", "vllm.v1.worker.cpu_worker"
_CORE, _ASYNC, _SYNC = "vllm.v1.engine.core", "vllm.v1.engine.async_llm", "vllm.v1.engine.llm_engine"
_ARGUMENTS, _OUTPUT = "vllm.engine.arg_utils", "vllm.v1.engine.output_processor"
_SERVER, _LAUNCHER = "vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.launchers.launcher"
_ALL_REDUCE = "vllm.distributed.device_communicators.custom_all_reduce"
_FORK = "zygote.context:get_mp_context"
_ON_DEMAND, _SPANS, _METRICS = "cuda_graphs.replacements", "record.vllm_spans", "record.metrics:with_ours"

_ROWS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    ALWAYS: (
        ("", "the parent of our logger", "plugin:log_as_vllm", "our lines go where vLLM's go, in its format"),
        ("vllm.logger", "configure_logging", "plugin:announce_after", "plugins are loaded before there is a log"),
        ("", "vllm.envs.environment_variables", "settings:add_to_vllm", "vLLM warns of variables it does not know"),
    ),
    OFF: (
        ("vllm.envs", "compile_factors", "settings:without_ours", "our variables are not in stock's cache key"),
        ("", "os.environ: JIT caches", "store.kernels:leave", "what a parent with the plugin has set is taken away"),
    ),
    NOT_RECORDED: (("", "sys.meta_path", "plugin:drop_record", "what the .pth file has begun is dropped"),),
    PATCHED: (("vllm.plugins", "load_plugins_by_group", "plugin:with_ours", "it loads this one whatever it is told"),),
    ACTIVE: (
        ("vllm.envs", "compile_factors", "settings:with_our_version", "stock's entries are neither read nor replaced"),
        (_CONFIG, "VllmConfig.__post_init__", "settings:checked", "our settings in additional_config are checked"),
        (_CONFIG, "VllmConfig.compute_hash", "settings:without_namespace", "they are not in the key"),
        (
            "vllm.platforms.cpu",
            "CpuPlatform.check_and_update_config",
            "platforms:keep_mode",
            "the compilation mode that the user asked for survives on CPU",
        ),
        (_ARGUMENTS, "EngineArgs.create_engine_config", "ops.auto:create_engine_config", "custom ops, as measured"),
        ("", "os.environ: JIT caches", "store.kernels:use", "kernels that libraries compile are kept in the store"),
        ("", "os.environ: reading", "zygote.reads:stop", "what is read is noted only until there is a zygote"),
        ("", "os.environ: _VLLM_COMPILE_EXT_RUN", "temporary:make_run_folder", "a folder for one vLLM's processes"),
        ("prometheus_client", "REGISTRY.collect", _METRICS, "our metrics are at /metrics"),
        ("prometheus_client.multiprocess", "MultiProcessCollector.collect", _METRICS, "also with several API servers"),
        ("", "sys.meta_path", "finder:swap", "our modules are served under vllm.compilation's names"),
        ("", "gc.freeze()", "plugin:unfreeze_later", "where models are defined: imports are no garbage while starting"),
        (_GRAPHS, "ModelCudaGraphManager", f"{_ON_DEMAND}:graph_manager", "graphs are captured on demand, on CUDA"),
        (_GRAPHS, "profile_cudagraph_memory", f"{_ON_DEMAND}:profile_cudagraph_memory", "nothing is captured for it"),
        ("vllm.v1.engine.utils", "get_mp_context", _FORK, "engines are forked from a process that has all imported"),
        ("vllm.v1.engine.coordinator", "get_mp_context", _FORK, "so is the coordinator of several engines"),
        ("vllm.v1.executor.multiproc_executor", "get_mp_context", _FORK, "so are workers"),
        (_PLAN, "compute_plan_fingerprint", f"{_ON_DEMAND}:plan_fingerprint", "its memory is beside graphs on demand"),
        (_RUNNER, "GPUModelRunner.capture_model", f"{_ON_DEMAND}:capture_model", "nothing is captured at start"),
        (_V1_RUNNER, "GPUModelRunner.capture_model", f"{_ON_DEMAND}:capture_model", "says that stock captures"),
        (
            _CORE,
            "EngineCoreProc._notify_idle_state_callbacks",
            f"{_ON_DEMAND}:notify_idle_state_callbacks",
            "graphs are captured while there are no requests",
        ),
        (
            "vllm.compilation.compiler_interface",
            "trigger_inductor_lazy_init",
            "compilation.hooks:make_patterns_late",
            "Inductor's patterns are made by the first compilation, not in every start",
        ),
        (
            "torch",
            "_TorchCompileInductorWrapper.__call__",
            "compilation.hooks:look_up_functions",
            "functions beside the model are kept; without a compiler they run uncompiled",
        ),
        (
            "torch._inductor.cpu_vec_isa",
            "valid_vec_isa_list",
            "inductor.workers:choose_one_instruction_set",
            "on CPU one instruction set is probed, not all that the processor names",
        ),
    ),
    STARTING: (
        ("", "sys.meta_path; os.environ", "plugin:record", "imports are timed; children find their start"),
        ("vllm.tracing.otel", "trace", f"{_SPANS}:trace", "vLLM's own spans go to the file of the start"),
        (_ARGUMENTS, "EngineArgs.create_engine_config", f"{_SPANS}:create_engine_config", "a start begins"),
        (_CORE, "EngineCoreProc.run_busy_loop", f"{_SPANS}:run_busy_loop", "an engine has started"),
        (_CORE, "DPEngineCoreProc.run_busy_loop", f"{_SPANS}:run_busy_loop", "an engine has started"),
        (_ASYNC, "AsyncLLM.__init__", f"{_SPANS}:async_engine", "a span; ready, without a server"),
        (_SYNC, "LLMEngine.__init__", f"{_SPANS}:sync_engine", "a span; ready"),
        (_ASYNC, "AsyncLLM.add_request", f"{_SPANS}:add_request", "the first request"),
        (_SYNC, "LLMEngine.add_request", f"{_SPANS}:add_request", "the first request"),
        (_OUTPUT, "OutputProcessor.process_outputs", f"{_SPANS}:process_outputs", "the first token: the start is over"),
        (_LAUNCHER, "NoSignalServer.startup", f"{_SPANS}:startup", "a span; ready, with a server"),
        (_GPU, "Worker.compile_or_warm_up_model", f"{_SPANS}:warm_up", "a worker has started"),
        (_CPU, "CPUWorker.compile_or_warm_up_model", f"{_SPANS}:warm_up_on_cpu", "a span; a worker has started"),
    ),
    COMPILING: (
        (
            "torch._dynamo.variables.nn_module",
            "UnspecializedNNModuleVariable.call_function",
            "trace.watch",
            "a repeated layer is traced once; `PLACES` lists the other places that see what a trace reads",
        ),
        ("torch._inductor.async_compile", "AsyncCompile.cpp_pybinding", "inductor.workers", "C++ compiles in threads"),
        ("torch._inductor.config", "compile_threads", "inductor.workers", "Triton compiles in Inductor's processes"),
        ("vllm.config.utils", "hash_factors", "key.config", "a miss can name the field that changed"),
        ("vllm.utils.hashing", "safe_hash", "key.config", "a miss can name the field that changed"),
    ),
    CAPTURING: (
        ("torch.cuda", "graph", "cuda_graphs.manager", "other threads may go on while one captures"),
        # With torch._C._host_emptyCache, which only a torch that is built for CUDA has.
        ("torch.cuda", "empty_cache", "cuda_graphs.manager", "caches of memory stay, also the host's"),
        (_GRAPHS, "graph_capture", "cuda_graphs.manager", "one stream serves all captures"),
        (_GRAPHS, "prepare_inputs_to_capture", "cuda_graphs.manager", "attention beside a graph takes less memory"),
        (_GRAPHS, "tqdm", "cuda_graphs.manager", "captures are quiet"),
        ("vllm.compilation.monitor", "cudagraph_capturing_enabled", "cuda_graphs.manager", "open only then"),
        # Its _IS_CAPTURING and _capture_registered.
        (_ALL_REDUCE, "CustomAllreduce", "cuda_graphs.ranks", "all-reduce reads inputs where they are"),
    ),
    WARMING: ((_CORE, "get_kv_cache_configs", "cli.warm_start:small_kv_cache", "the engine has a small KV cache"),),
}

# Functions of vLLM that get a span while a start is recorded: its name and its phase.
_SPANNED = (
    (_SERVER, "build_app", "build app", "api server"),
    (_SERVER, "init_app_state", "prepare to serve", "api server"),
    ("vllm.v1.engine.utils", "CoreEngineProcManager.__init__", "start engine core", "spawn"),
    ("vllm.v1.executor.multiproc_executor", "WorkerProc.make_worker_process", "start worker", "spawn"),
    ("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", "init device", "distributed"),
    (_GPU, "init_worker_distributed_environment", "distributed init", "distributed"),
    ("vllm.model_executor.model_loader.utils", "process_weights_after_loading", "process weights", "weights"),
    (_GPU, "Worker.determine_available_memory", "memory profiling", "memory profiling"),
    (_CPU, "CPUWorker.determine_available_memory", "memory profiling", "memory profiling"),
    ("vllm.model_executor.warmup.kernel_warmup", "kernel_warmup", "kernel warm-up", "warm-up"),
    ("vllm.v1.worker.gpu.warmup", "warmup_kernels", "kernel warm-up", "warm-up"),
    (_V1_RUNNER, "GPUModelRunner.profile_cudagraph_memory", "profile graph memory", "memory profiling"),
    (_RUNNER, "GPUModelRunner.load_model", "load model", "model construction"),
    (_RUNNER, "GPUModelRunner.capture_model", "capture model", "graph capture"),
    (_RUNNER, "GPUModelRunner.profile_cudagraph_memory", "profile graph memory", "memory profiling"),
)

TABLE = (
    *(Change(when, *row) for when, rows in _ROWS.items() for row in rows),
    *(
        Change(STARTING, module, attribute, f"{_SPANS}:{'staged' if module == _SERVER else 'spanned'}", "a span", about)
        for module, attribute, *about in _SPANNED
    ),
)


def make(*kinds: str) -> list[Undo]:
    """Make the rows of these `kinds` of `when`, in the table's order; returns the undos, to be called in reverse.

    Of a module that is not imported yet a row is made later, and its undo is added to the list then; what goes wrong
    then costs a line.  What goes wrong now undoes the rows before it and raises.
    """
    undos: list[Undo] = []
    try:
        for change in TABLE:
            if change.when not in kinds:
                continue
            if change.module:
                _make_once_imported(change, undos)
            elif undo_it := change.function()(*change.given):
                undos.append(undo_it)
    except BaseException:
        undo(undos)
        raise
    return undos


def undo(undos: list[Undo]) -> None:
    """Undo in reverse order and empty the list."""
    while undos:
        undos.pop()()


def _make_once_imported(change: Change, undos: list[Undo]) -> None:
    imported = change.module in sys.modules

    def apply(module: ModuleType) -> None:
        try:
            function = change.function()
            undos.append(replace(*change.owner(), lambda stock: function(stock, *change.given)))
        except Exception as error:
            if imported and change.when != STARTING:
                raise
            # Whoever imports the module must not fail.
            level = logging.DEBUG if change.when == STARTING else logging.WARNING
            logger.log(level, "%s stays as it is: %s", change.what, harmless.error(error))

    if not imported:
        finder.install()
    undos.append(finder.finder.after(change.module, apply))


def problems() -> list[str]:
    """What cannot be found of the rows, in vLLM, torch and our own rooms.  Imports what they name.

    A module that this machine cannot import, since it needs a library for GPUs, is not used here either.
    """
    found = []
    for change in TABLE:
        try:
            if ":" in change.by:
                change.function()
            if change.module:
                owner, name = change.owner()
                getattr(owner, name)
        except (ImportError, AttributeError) as error:
            # "vllm._C" and its like are libraries.
            if isinstance(error, AttributeError) or re.match(r"(vllm|torch)(\.[^_]|$)", error.name or ""):
                found.append(f"{change.what} by {change.by}: {error}")
            else:
                logger.debug("%s: %s", change.what, error)
    return found


def markdown() -> str:
    """The table as the docs page."""
    rows = [f"| {c.when} | `{c.what}` | {c.why} | `{c.by.replace('.', '/').partition(':')[0]}.py` |" for c in TABLE]
    return "\n".join([_PAGE, "| when | what | why | by |", "|---|---|---|---|", *rows]) + "\n"


_PAGE = """# What the plugin changes outside its own modules

Made by `python -m vllm_compile_ext.changes` from `vllm_compile_ext/changes.py`; do not edit.

`vllm_compile_ext.plugin.unregister` undoes each; tests use it. Switched off (`VLLM_COMPILE_EXT=0`), or where it cannot
take over, the plugin makes only those marked "active or off", "off" and "where starts are not recorded". What a
[patched](../patches/README.md) vLLM makes before it loads plugins stays.
"""


if __name__ == "__main__":
    print(markdown(), end="")
