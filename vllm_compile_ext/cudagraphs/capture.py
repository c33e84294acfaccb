"""The state of torch and vLLM in which upstream's capture may run between the steps of a serving engine."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from vllm.compilation import monitor
from vllm.distributed import parallel_state
from vllm.utils import gpu_sync_debug


class _ThreadLocalGraph(torch.cuda.graph):
    """Other threads of a serving worker copy outputs and wait for events: only this thread's calls end the capture."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"capture_error_mode": "thread_local"} | kwargs)


@contextmanager
def between_steps(upstream: ModuleType, stream: torch.cuda.Stream) -> Iterator[None]:
    """What `upstream` (vllm.v1.worker.gpu.cudagraph_utils) captures in here, it captures on `stream`, quietly.

    One stream for all captures: cuBLAS keeps a workspace for each, and graphs of one pool share memory only on one
    stream.  Caches of memory are kept, since the next steps need them.  Waits for the device before and after.
    """

    @contextmanager
    def graph_capture(device: torch.device) -> Iterator[None]:
        context = parallel_state.GraphCaptureContext(stream)
        with (
            parallel_state.get_tp_group().graph_capture(context),
            parallel_state.get_pp_group().graph_capture(context),
            parallel_state.get_dp_group().graph_capture(context),
        ):
            yield

    with ExitStack() as stack:
        stack.enter_context(gpu_sync_debug.gpu_sync_allowed())
        torch.cuda.synchronize()
        stack.enter_context(_allowed())
        stack.enter_context(patch.object(upstream, "graph_capture", graph_capture))
        stack.enter_context(patch.object(upstream, "tqdm", lambda items, **_: items))
        stack.enter_context(patch.object(torch.cuda, "graph", _ThreadLocalGraph))
        stack.enter_context(patch.object(torch.cuda, "empty_cache", _nothing))
        stack.enter_context(patch.object(torch._C, "_host_emptyCache", _nothing))
        stack.enter_context(_without_gc())
        try:
            yield
        finally:
            torch.cuda.synchronize()


@contextmanager
def _allowed() -> Iterator[None]:
    """Open vLLM's guard against captures at the wrong time, and close it again."""
    before = monitor.cudagraph_capturing_enabled
    monitor.set_cudagraph_capturing_enabled(True)
    try:
        yield
    finally:
        monitor.set_cudagraph_capturing_enabled(before)


@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _nothing() -> None:
    pass


def free_memory() -> int:
    """Bytes free on the device; what torch keeps unused counts, since it is given back when that is needed."""
    free, _ = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(free + unused)


def give_back() -> None:
    """Give back what torch keeps unused."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
