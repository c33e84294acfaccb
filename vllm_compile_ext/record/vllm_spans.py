"""The spans of a start that lie in vLLM 0.32.0: its own, and functions of it that get one or mark a start's stages.

`vllm_compile_ext.changes` lists them.  Each is replaced when its module has been imported, before others can take the
function from there by name.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

from vllm_compile_ext import harmless, platforms, versions
from vllm_compile_ext.record import recorder
from vllm_compile_ext.record.events import quiet, quietly, span, stage
from vllm_compile_ext.record.recorder import Recorder

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

    @contextmanager
    def start_as_current_span(self, name: str, *, attributes: Any = None, **_: Any) -> Iterator[None]:
        """A span; processes that are started inside of it are part of it, as vLLM means it."""
        try:
            with span(name, PHASES.get(name), **_shown(attributes)):
                quietly(Recorder.hand_down)
                yield
        finally:
            quietly(Recorder.hand_down)

    def start_span(self, name: str, *, start_time: int, kind: Any = None, **options: Any) -> Any:
        if kind is not None:  # of a request
            return self._stock.start_span(name, start_time=start_time, kind=kind, **options)
        return _FinishedSpan(name, start_time)


class _FinishedSpan:
    """A span that vLLM makes when it is over."""

    def __init__(self, name: str, start: int) -> None:
        self._name, self._start = name, start
        self._attrs = {"phase": PHASES[name]} if name in PHASES else {}

    def set_attributes(self, attributes: Any) -> None:
        self._attrs = _shown(attributes) | self._attrs

    def end(self, end_time: int | None = None) -> None:
        quietly(lambda to: to.begin(self._name, self._attrs, "", self._start, end_time or recorder.now()))


def _shown(attributes: Any) -> dict[str, Any]:
    """What may be seen of a span's attributes, without where in vLLM's source it is made."""
    kept = {k: v for k, v in (attributes or {}).items() if not str(k).startswith("code.")}
    return {k: v if harmless.is_harmless(v) else harmless.HIDDEN for k, v in kept.items()}


def trace(stock: Any) -> Any:
    """`vllm.tracing.otel.trace`, which is None where OpenTelemetry is not installed."""
    return stock if stock is None or isinstance(stock, Trace) else Trace(stock)


# Rows of the table of changes: what a function of vLLM runs inside of


def within(stock: Function, make: Callable[..., AbstractContextManager[Any]]) -> Function:
    """Runs the stock function, or coroutine, inside of what `make` returns for its arguments."""

    async def run_async(*args: Any, **kwargs: Any) -> Any:
        with make(*args, **kwargs):
            return await stock(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        with make(*args, **kwargs):
            return stock(*args, **kwargs)

    return run_async if inspect.iscoroutinefunction(stock) else run


def spanned(stock: Function, name: str, phase: str) -> Function:
    """A span around each call."""
    return within(stock, lambda *args, **kwargs: span(name, phase))


def staged(stock: Function, name: str, phase: str) -> Function:
    """A stage of the front end around each call."""
    return within(stock, lambda *args, **kwargs: stage(name, phase))


def row(around: Callable[..., Iterator[None]]) -> Callable[[Function], Function]:
    """Makes a row of a generator: what is before its ``yield`` runs before the function, the rest after it."""
    make = contextmanager(around)
    return lambda stock: within(stock, make)


@contextmanager
def stopping() -> Iterator[None]:
    """Ends the start when the engine cannot be made."""
    try:
        yield
    except BaseException as error:
        text = harmless.error(error)
        quietly(lambda to: to.stop(text))
        raise


@row
def create_engine_config(arguments: Any, *_: Any, **__: Any) -> Iterator[None]:
    """`EngineArgs.create_engine_config`: here an engine begins."""
    begin(arguments)
    # A stage, since vLLM may start a process that looks at the model's class.
    with stage("engine configuration", "config"), stopping():
        yield


# The front end's side of the engine being made: everything else happens meanwhile.


@row
def async_engine(*_: Any, **__: Any) -> Iterator[None]:
    """After it requests can come, or the server has yet to be built around the engine."""
    with stage("engine client", "api server"), stopping():
        yield
    quietly(_async_engine_made)


def _async_engine_made(to: Recorder) -> None:
    if "vllm.entrypoints.launchers.api_server.entry" not in sys.modules:
        to.ready()
    elif to.kind == recorder.FRONT:
        to.begin_stage("api server", {"phase": "api server"})


@row
def sync_engine(*_: Any, **__: Any) -> Iterator[None]:
    with stage("engine client", "config"), stopping():
        yield
    quietly(Recorder.ready)


@row
def startup(*_: Any, **__: Any) -> Iterator[None]:
    """`NoSignalServer.startup`: the server listens."""
    with stage("listen", "api server"):
        yield
    quietly(Recorder.ready)


@row
def add_request(*_: Any, **__: Any) -> Iterator[None]:
    quietly(Recorder.request)
    yield


@row
def process_outputs(_processor: Any, outputs: Any, *_: Any, **__: Any) -> Iterator[None]:
    """`OutputProcessor.process_outputs`: every token comes by here."""
    yield
    if recorder.active() is not None and any(one.new_token_ids or one.pooling_output is not None for one in outputs):
        quietly(Recorder.first_token)


@row
def run_busy_loop(*_: Any, **__: Any) -> Iterator[None]:
    """The engine core is up, in a process of its own."""
    quietly(lambda to: to.done() if to.kind != recorder.FRONT else None)
    yield


@row
def warm_up(*_: Any, **__: Any) -> Iterator[None]:
    """The last thing that a worker does in a start."""
    yield
    quietly(lambda to: to.done() if to.kind == recorder.WORKER else None)


def warm_up_on_cpu(stock: Function) -> Function:
    return warm_up(spanned(stock, "warm-up", "warm-up"))


# Where a start begins


def begin(arguments: Any) -> None:
    """Make the file of the start; for a second engine of the process, of a second start."""
    with quiet():
        before = recorder.active()
        if before is not None and before.ready_at is not None:
            before.stop()  # its first request never came
        to = recorder.active()
        if to is None:
            to = recorder.begin()
            if to is not None:
                to.watch_imports()
        if to is not None and to.open(about(arguments), getattr(arguments, "model", None)):
            from vllm_compile_ext.record.watcher import watch

            watch(to, getattr(arguments, "otlp_traces_endpoint", None))


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


def install(loaded: int) -> Callable[[], None]:
    """Record this process, in which the plugin is being loaded since `loaded`; returns the undo."""
    to = recorder.begin()
    if to is not None:
        to.record_imports(loaded)
        to.begin("load plugin", {"phase": "plugin"}, to.process, loaded, recorder.now())
    return forget


def forget() -> None:
    """Record nothing after all, and give vLLM's tracing back what the .pth file took."""
    tracing: Any = sys.modules.get("vllm.tracing.otel")
    if isinstance(getattr(tracing, "trace", None), Trace):
        tracing.trace = tracing.trace.stock
    recorder.forget()
