"""Where a start has no span of vLLM's: functions of vLLM 0.32.0 that get one, and those that mark its stages.

Each is put in place when its module has been imported, before others can take the function from there by name, and only
where the function is there.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from types import ModuleType
from typing import Any

from vllm_compile_ext import harmless, platforms, versions
from vllm_compile_ext.record import imports, recorder
from vllm_compile_ext.record.spans import span, stage

logger = logging.getLogger(__name__)

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Hook:
    """The function `what` of the module `where`, and what is made of it."""

    where: str
    what: str
    wrap: Wrap


def spanned(name: str, phase: str, kind: type[span] = span) -> Wrap:
    """A span around each call."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with kind(name, phase):
                    return await function(*args, **kwargs)

            return call_async

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with kind(name, phase):
                return function(*args, **kwargs)

        return call

    return wrap


def staged(name: str, phase: str) -> Wrap:
    """A stage of the front end around each call."""
    return spanned(name, phase, stage)


def then(after: Callable[[recorder.Recorder], None], wrap_first: Wrap | None = None) -> Wrap:
    """`after` when a call has returned, of what `wrap_first` makes of the function."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        inner = wrap_first(function) if wrap_first is not None else function
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                result = await inner(*args, **kwargs)
                _quietly(after)
                return result

            return call_async

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            _quietly(after)
            return result

        return call

    return wrap


def _or_stop(function: Callable[..., Any]) -> Callable[..., Any]:
    """When it raises, the engine that was being started will not come up."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            text = harmless.error(error)
            _quietly(lambda to: to.stop(text))
            raise

    return call


def _client(phase: str) -> Wrap:
    """The front end's side of the engine: everything else happens meanwhile."""
    return lambda function: staged("engine client", phase)(_or_stop(function))


def _quietly(do: Callable[[recorder.Recorder], None]) -> None:
    to = recorder.active()
    if to is not None:
        try:
            do(to)
        except Exception as error:
            logger.debug("not recorded: %s: %s", type(error).__name__, error)


def _configure(function: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineArgs.create_engine_config`: here an engine begins."""

    @functools.wraps(function)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin(self)
        # vLLM may start a process that looks at the model's class.
        with stage("engine configuration", "config"):
            config = _or_stop(function)(self, *args, **kwargs)
        _quietly(lambda to: _exporting(to, config))
        return config

    return create_engine_config


def begin(arguments: Any) -> None:
    """Begin the file; for a second engine of the process, a second start."""
    try:
        before = recorder.active()
        if before is not None and before.ready_at is not None:
            before.stop()  # its first request never came
        if recorder.active() is None:
            restart()
        _quietly(lambda to: to.open(about(arguments), getattr(arguments, "model", None)))
    except Exception as error:
        logger.debug("not recorded: %s: %s", type(error).__name__, error)


def restart() -> None:
    """Record from here on."""
    recorder.meet(sys.modules.get("vllm.tracing.otel"))
    to = recorder.active()
    if to is not None:
        to.watch()


def _exporting(to: recorder.Recorder, config: Any) -> None:
    """Whether spans are exported is known now; where vLLM is told an endpoint it sees to it."""
    if config.observability_config.otlp_traces_endpoint is None:
        to.backend.export()


def about(arguments: Any) -> dict[str, Any]:
    """What the start's first line says of the engine, by `EngineArgs`."""
    options = harmless.options(arguments) if is_dataclass(arguments) else {}
    options.pop("model", None)
    return {
        "model": harmless.model_name(str(getattr(arguments, "model", ""))),
        "options": options,
        "versions": _versions(),
        "machine": _machine(),
    }


def _versions() -> dict[str, str]:
    from vllm_compile_ext import __version__

    return {"vllm": versions.vllm_version(), "torch": versions.torch_version(), "plugin": __version__}


def _machine() -> dict[str, Any]:
    return {
        "host": os.uname().nodename,
        "system": platforms.name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _ready(to: recorder.Recorder) -> None:
    if to.ready_at is None:
        from vllm_compile_ext.record import table

        to.ready()
        if to.name in ("front end", "ApiServer_0"):  # of several, one says it
            table.say_soon(to)


def _engine_is_up(to: recorder.Recorder) -> None:
    """`AsyncLLM` is made: requests can come, or the server has yet to be built around it."""
    if "vllm.entrypoints.launchers.api_server.entry" in sys.modules:
        to.serving()
    else:
        _ready(to)


def _first_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.process_outputs`: every token comes by here."""

    @functools.wraps(function)
    def process_outputs(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, outputs, *args, **kwargs)
        if recorder.active() is not None and any(
            output.new_token_ids or output.pooling_output is not None for output in outputs
        ):
            _quietly(lambda to: to.first_token())
        return result

    return process_outputs


def _request(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def add_request_async(*args: Any, **kwargs: Any) -> Any:
            _quietly(lambda to: to.request())
            return await function(*args, **kwargs)

        return add_request_async

    @functools.wraps(function)
    def add_request(*args: Any, **kwargs: Any) -> Any:
        _quietly(lambda to: to.request())
        return function(*args, **kwargs)

    return add_request


def _engine_done(function: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineCoreProc.run_busy_loop`: the engine is up.  Its `__init__` runs already when the plugin is loaded."""

    @functools.wraps(function)
    def run_busy_loop(*args: Any, **kwargs: Any) -> Any:
        _quietly(lambda to: to.done())
        return function(*args, **kwargs)

    return run_busy_loop


def _worker_done(to: recorder.Recorder) -> None:
    if to.kind == recorder.WORKER:
        to.done()


_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_V1 = "vllm.v1.worker.gpu_model_runner"
_GPU, _CPU, _V2 = "vllm.v1.worker.gpu_worker", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.gpu.model_runner"

HOOKS = (
    Hook("vllm.engine.arg_utils", "EngineArgs.create_engine_config", _configure),
    Hook("vllm.v1.engine.utils", "CoreEngineProcManager.__init__", spanned("start engine core", "spawn")),
    Hook("vllm.v1.executor.multiproc_executor", "WorkerProc.make_worker_process", spanned("start worker", "spawn")),
    Hook("vllm.v1.engine.core", "EngineCoreProc.run_busy_loop", _engine_done),
    Hook("vllm.v1.engine.core", "DPEngineCoreProc.run_busy_loop", _engine_done),
    Hook("vllm.v1.engine.async_llm", "AsyncLLM.__init__", then(_engine_is_up, _client("api server"))),
    Hook("vllm.v1.engine.async_llm", "AsyncLLM.add_request", _request),
    Hook("vllm.v1.engine.llm_engine", "LLMEngine.__init__", then(_ready, _client("config"))),
    Hook("vllm.v1.engine.llm_engine", "LLMEngine.add_request", _request),
    Hook("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", _first_output),
    Hook(_ENTRY, "build_app", staged("build app", "api server")),
    Hook(_ENTRY, "init_app_state", staged("prepare to serve", "api server")),
    Hook("vllm.entrypoints.launchers.launcher", "NoSignalServer.startup", then(_ready, staged("listen", "api server"))),
    Hook("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", spanned("init device", "distributed")),
    Hook(_GPU, "init_worker_distributed_environment", spanned("distributed init", "distributed")),
    Hook(
        "vllm.model_executor.model_loader.utils", "process_weights_after_loading", spanned("process weights", "weights")
    ),
    Hook(_GPU, "Worker.determine_available_memory", spanned("memory profiling", "memory profiling")),
    Hook(_CPU, "CPUWorker.determine_available_memory", spanned("memory profiling", "memory profiling")),
    Hook(_GPU, "Worker.compile_or_warm_up_model", then(_worker_done)),
    Hook(_CPU, "CPUWorker.compile_or_warm_up_model", then(_worker_done, spanned("warm-up", "warm-up"))),
    Hook("vllm.model_executor.warmup.kernel_warmup", "kernel_warmup", spanned("kernel warm-up", "warm-up")),
    Hook("vllm.v1.worker.gpu.warmup", "warmup_kernels", spanned("kernel warm-up", "warm-up")),
    Hook(_V1, "GPUModelRunner.profile_cudagraph_memory", spanned("profile graph memory", "memory profiling")),
    Hook(_V2, "GPUModelRunner.load_model", spanned("load model", "model construction")),
    Hook(_V2, "GPUModelRunner.capture_model", spanned("capture model", "graph capture")),
    Hook(_V2, "GPUModelRunner.profile_cudagraph_memory", spanned("profile graph memory", "memory profiling")),
)


class Hooks:
    """The hooks of this process, in place or waiting for their modules."""

    def __init__(self) -> None:
        self._undos: list[Callable[[], None]] = []
        self._wanted = True

    def install(self) -> None:
        watcher = imports.install()
        for hook in HOOKS:
            watcher.when(hook.where, functools.partial(self._make, hook))

    def _make(self, hook: Hook, module: ModuleType) -> None:
        if not self._wanted:
            return
        path = hook.what.split(".")
        owner: Any = module
        for part in path[:-1]:
            owner = getattr(owner, part, None)
        raw = vars(owner).get(path[-1]) if owner is not None else None
        if raw is None:
            logger.debug("no %s.%s in this vLLM", hook.where, hook.what)
            return
        static = isinstance(raw, staticmethod)
        wrapped = hook.wrap(raw.__func__ if static else raw)
        made: Any = staticmethod(wrapped) if static else wrapped
        setattr(owner, path[-1], made)

        def undo() -> None:
            if vars(owner).get(path[-1]) is made:
                setattr(owner, path[-1], raw)

        self._undos.append(undo)

    def undo(self) -> None:
        self._wanted = False
        while self._undos:
            self._undos.pop()()


_hooks: Hooks | None = None


def install(loaded: int) -> Callable[[], None]:
    """Record this process, of which the plugin is being loaded since `loaded`; returns the undo."""
    global _hooks
    recorder.meet(sys.modules.get("vllm.tracing.otel"))
    to = recorder.active()
    if to is not None:
        to.settle(loaded)
        if recorder.inherited() is not None:
            to.join()
    _hooks = Hooks()
    _hooks.install()
    _quietly(lambda to: to.loaded(loaded))
    return uninstall


def uninstall() -> None:
    """Undo `install`."""
    global _hooks
    if _hooks is not None:
        _hooks.undo()
        _hooks = None
    recorder.forget()
    if imports.observer is not None:
        imports.observer.remove()
    otel = sys.modules.get("vllm_compile_ext.record.otel")
    if otel is not None:
        otel.uninstall()
