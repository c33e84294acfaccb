"""The spans of a start that lie in vLLM 0.32.0: its own, and functions of it that get one or mark a start's stages.

`vllm_compile_ext.changes` lists them.  Each is replaced when its module has been imported, before others can take the
function from there by name.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

from vllm_compile_ext import harmless, platforms, versions
from vllm_compile_ext.record import recorder
from vllm_compile_ext.record.recorder import Recorder
from vllm_compile_ext.record.spans import quiet, span, stage

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

# The phases of vLLM's own spans (each use of `vllm.tracing.instrument`).  Where a span waits for other processes its
# phase is "spawn": theirs say what they do meanwhile.
PHASES: dict[str, str] = {
    "API server setup": "api server",
    "Overall Loading": "spawn",
    "SyncMPClient init": "spawn",
    "AsyncMPClient init": "spawn",
    "EngineCoreProc init": "config",
    "Executor init": "spawn",
    "Worker init": "distributed",
    "Init device": "distributed",
    "Load model": "model construction",
    "Loading (CPU)": "model construction",
    "Loading (GPU)": "model construction",
    "Initialize model": "model construction",
    "Download weights - HF": "weights",
    "Load weights": "weights",
    "Prepare model": "kv cache",
    "Allocate KV cache": "kv cache",
    "Compile graph": "compile",
    "Inductor compilation": "compile",
    "Warmup (CPU)": "warm-up",
    "Warmup (GPU)": "warm-up",
    "DeepGemm warmup": "warm-up",
    "CuTeDSL warmup": "warm-up",
    "MiniMax M3 MSA warmup": "warm-up",
    "Capture model": "graph capture",
}


# vLLM's own spans


class Trace:
    """`opentelemetry.trace` for ``vllm.tracing.otel``: while this process starts, spans are ours, except requests'."""

    def __init__(self, stock: ModuleType) -> None:
        self.stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
        tracer, to = self.stock.get_tracer(*args, **kwargs), recorder.active()
        # What Ray starts, for one, never gets a file: nobody would send its spans.
        records = to is not None and (to.file is not None or recorder.vllm_command())
        return _Tracer(tracer) if records else tracer


class _Tracer:
    """The two methods of a tracer that vLLM uses."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def start_as_current_span(self, name: str, *, attributes: Any = None, **_: Any) -> AbstractContextManager[Any]:
        return _VllmSpan(name, attributes)

    def start_span(self, name: str, *, start_time: int, kind: Any = None, **options: Any) -> Any:
        if kind is not None:  # of a request
            return self._stock.start_span(name, start_time=start_time, kind=kind, **options)
        return _FinishedSpan(name, start_time)


class _VllmSpan(span):
    """Processes that are started inside of it are part of it, as vLLM means it."""

    __slots__ = ()

    def __init__(self, name: str, attributes: Any) -> None:
        super().__init__(name, PHASES.get(name))
        self._attrs = _shown(attributes) | self._attrs

    def _open(self, to: Recorder) -> None:
        super()._open(to)
        to.hand_down()

    def _close(self, to: Recorder, span: str, error: str | None) -> None:
        super()._close(to, span, error)
        to.hand_down()


class _FinishedSpan:
    def __init__(self, name: str, start: int) -> None:
        self._name, self._start, self._attrs = name, start, {"phase": PHASES[name]} if name in PHASES else {}

    def set_attributes(self, attributes: Any) -> None:
        self._attrs = _shown(attributes) | self._attrs

    def end(self, end_time: int | None = None) -> None:
        _quietly(lambda to: to.add(self._name, self._start, end_time or recorder.now(), self._attrs))


def _shown(attributes: Any) -> dict[str, Any]:
    """What may be seen of a span's attributes, without where in vLLM's source it is made."""
    kept = {k: v for k, v in (attributes or {}).items() if not str(k).startswith("code.")}
    return {k: v if harmless.is_harmless(v) else harmless.HIDDEN for k, v in kept.items()}


def trace(stock: Any) -> Any:
    """`vllm.tracing.otel.trace`, which is None where OpenTelemetry is not installed."""
    return stock if stock is None or isinstance(stock, Trace) else Trace(stock)


# Spans around functions


def within(stock: Function, make: Callable[[], AbstractContextManager[Any]]) -> Function:
    """Runs the stock function, or coroutine, inside of what `make` returns."""

    async def run_async(*args: Any, **kwargs: Any) -> Any:
        with make():
            return await stock(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        with make():
            return stock(*args, **kwargs)

    return run_async if inspect.iscoroutinefunction(stock) else run


def _quietly(do: Callable[[Recorder], Any]) -> None:
    to = recorder.active()
    if to is not None:
        with quiet:
            do(to)


# Where a start begins


def create_engine_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineArgs.create_engine_config`: here an engine begins."""

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin(self)
        # A stage, since vLLM may start a process that looks at the model's class.
        with stage("engine configuration", "config"), stopping():
            return stock(self, *args, **kwargs)

    return replacement


def begin(arguments: Any) -> None:
    """Make the file of the start; for a second engine of the process, of a second start."""
    with quiet:
        before = recorder.active()
        if before is not None and before.ready_at is not None:
            before.stop()  # its first request never came
        to = recorder.active()
        if to is None:
            to = recorder.begin()
            if to is not None:
                to.watch_imports()
        if to is not None and to.open(about(arguments), getattr(arguments, "model", None)) and to.file is not None:
            from vllm_compile_ext.record.watcher import Watcher

            to.watcher = Watcher(to, to.file.path, getattr(arguments, "otlp_traces_endpoint", None))
            to.watcher.start()


def about(arguments: Any) -> dict[str, Any]:
    """What the first line says of the engine, by `EngineArgs`."""
    from vllm_compile_ext import __version__

    options = harmless.options(arguments) if is_dataclass(arguments) else {}
    options.pop("model", None)
    return {
        "model": harmless.model_name(str(getattr(arguments, "model", ""))),
        "options": options,
        "versions": {"vllm": versions.vllm_version(), "torch": versions.torch_version(), "plugin": __version__},
        "machine": {
            "host": os.uname().nodename,
            "system": platforms.name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


# Where it ends


@contextmanager
def stopping() -> Iterator[None]:
    """Ends the start when the engine cannot be made."""
    try:
        yield
    except BaseException as error:
        text = harmless.error(error)
        _quietly(lambda to: to.stop(text))
        raise


@contextmanager
def _engine_client(phase: str, made: Callable[[Recorder], None]) -> Iterator[None]:
    """The front end's side of the engine being made: everything else happens meanwhile."""
    with stage("engine client", phase), stopping():
        yield
    _quietly(made)


def _async_engine_made(to: Recorder) -> None:
    """Requests can come, or the server has yet to be built around the engine."""
    if "vllm.entrypoints.launchers.api_server.entry" in sys.modules:
        if to.kind == recorder.FRONT:
            to.begin_stage("api server", {"phase": "api server"})
    else:
        to.ready()


@contextmanager
def _listening() -> Iterator[None]:
    with stage("listen", "api server"):
        yield
    _quietly(Recorder.ready)


@contextmanager
def _first_request() -> Iterator[None]:
    _quietly(Recorder.request)
    yield


def process_outputs(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.process_outputs`: every token comes by here."""

    def replacement(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, outputs, *args, **kwargs)
        if recorder.active() is not None and any(
            output.new_token_ids or output.pooling_output is not None for output in outputs
        ):
            _quietly(Recorder.first_token)
        return result

    return replacement


@contextmanager
def _engine_runs() -> Iterator[None]:
    """The engine core is up, in a process of its own."""
    _quietly(lambda to: to.done() if to.kind != recorder.FRONT else None)
    yield


@contextmanager
def _worker_warms_up() -> Iterator[None]:
    """The last thing that a worker does in a start."""
    yield
    _quietly(lambda to: to.done() if to.kind == recorder.WORKER else None)


@contextmanager
def _cpu_worker_warms_up() -> Iterator[None]:
    with _worker_warms_up(), span("warm-up", "warm-up"):
        yield


# Rows of the table of changes.


def spanned(stock: Function, name: str, phase: str) -> Function:
    """A span around each call."""
    return within(stock, lambda: span(name, phase))


def staged(stock: Function, name: str, phase: str) -> Function:
    """A stage of the front end around each call."""
    return within(stock, lambda: stage(name, phase))


def run_busy_loop(stock: Function) -> Function:
    return within(stock, _engine_runs)


def async_engine(stock: Function) -> Function:
    return within(stock, lambda: _engine_client("api server", _async_engine_made))


def sync_engine(stock: Function) -> Function:
    return within(stock, lambda: _engine_client("config", Recorder.ready))


def add_request(stock: Function) -> Function:
    return within(stock, _first_request)


def startup(stock: Function) -> Function:
    return within(stock, _listening)


def warm_up(stock: Function) -> Function:
    return within(stock, _worker_warms_up)


def warm_up_on_cpu(stock: Function) -> Function:
    return within(stock, _cpu_worker_warms_up)


def install(loaded: int) -> Callable[[], None]:
    """Record this process, in which the plugin is being loaded since `loaded`; returns the undo."""
    to = recorder.begin()
    if to is not None:
        to.record_imports(loaded)
        to.add("load plugin", loaded, recorder.now(), {"phase": "plugin"}, to.process)
    return forget


def forget() -> None:
    """Record nothing after all, and give vLLM's tracing back what the .pth file took."""
    tracing: Any = sys.modules.get("vllm.tracing.otel")
    if isinstance(getattr(tracing, "trace", None), Trace):
        tracing.trace = tracing.trace.stock
    recorder.forget()
