"""The state of torch and vLLM in which upstream's capture may run between the steps of a serving engine."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from vllm.compilation import monitor
from vllm.utils import gpu_sync_debug


class _RelaxedGraph(torch.cuda.graph):
    """Other threads of a serving worker copy outputs and wait for events meanwhile, and this one may load a kernel for
    the first time: neither is a reason to break the capture off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"capture_error_mode": "relaxed"} | kwargs)


@contextmanager
def between_steps(upstream: ModuleType, stream: torch.cuda.Stream) -> Iterator[None]:
    """What `upstream` (vllm.v1.worker.gpu.cudagraph_utils) captures in here, it captures on `stream`, quietly.

    One stream for all captures: cuBLAS keeps a workspace for each, and graphs of one pool share memory only on one
    stream.  Caches of memory are kept, since the next steps need them.  Waits for the device before and after.

    Ranks do not exchange addresses at its end, as they do at the end of upstream's (parallel_state.graph_capture): see
    `addresses`.

    Attention runs beside a PIECEWISE graph's pieces, and FLASH_ATTN would take memory for up to 32 partial results of
    each token (flash_attn.py: max_num_splits; 0.5 MiB a token for Llama 8B), which torch then keeps for `stream` alone.
    What it computes there is not used, so one has to do.
    """

    @contextmanager
    def graph_capture(device: torch.device) -> Iterator[None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield

    prepare = upstream.prepare_inputs_to_capture

    def prepare_inputs_to_capture(*args: Any, **kwargs: Any) -> Any:
        state = prepare(*args, **kwargs)
        if not kwargs["full_cudagraph"]:
            _one_split(state.attn_metadata)
        return state

    with ExitStack() as stack:
        stack.enter_context(gpu_sync_debug.gpu_sync_allowed())
        torch.cuda.synchronize()
        stack.enter_context(_allowed())
        stack.enter_context(patch.object(upstream, "graph_capture", graph_capture))
        stack.enter_context(patch.object(upstream, "prepare_inputs_to_capture", prepare_inputs_to_capture))
        stack.enter_context(patch.object(upstream, "tqdm", lambda items, **_: items))
        stack.enter_context(patch.object(torch.cuda, "graph", _RelaxedGraph))
        stack.enter_context(patch.object(torch.cuda, "empty_cache", _nothing))
        stack.enter_context(patch.object(torch._C, "_host_emptyCache", _nothing))
        stack.enter_context(_without_gc())
        try:
            yield
        finally:
            torch.cuda.synchronize()


def _one_split(metadata: Mapping[str, Any] | None) -> None:
    for layer in (metadata or {}).values():
        if hasattr(layer, "max_num_splits"):
            layer.max_num_splits = 1
            layer.scheduler_metadata = None  # made for more


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
    """Bytes free on the device; what torch keeps unused does not count."""
    return int(torch.cuda.mem_get_info()[0])


def reserved_memory() -> int:
    """Bytes that torch has taken from the device in this process."""
    return int(torch.cuda.memory_reserved())


def give_back() -> None:
    """Give back to the device what torch keeps unused."""
    torch.cuda.empty_cache()


@contextmanager
def in_pool(pool: Any, device: torch.device) -> Iterator[None]:
    """Allocate from the graphs' pool: what is freed again is there for graphs, the largest size first, as in stock's
    order of captures.  The pool is kept for good; releasing it would forbid captures into it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    torch._C._cuda_beginAllocateCurrentThreadToPool(index, pool)
    try:
        yield
    finally:
        torch._C._cuda_endAllocateToPool(index, pool)


def mend(pool: Any, device: torch.device) -> None:
    """After a capture that broke off: torch does not close the pool it allocated from (`CUDAGraph::capture_end` raises
    before it does, torch 2.13), and would neither take another capture into it nor give back unused memory any more."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # it was not open
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
