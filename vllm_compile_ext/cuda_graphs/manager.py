"""vLLM's `ModelCudaGraphManager`, capturing on demand between the steps of a serving engine.

Facts from vllm/v1/worker/gpu/cudagraph_utils.py and model_runner.py, vLLM 0.32.0: the runner calls `dispatch` at the
start of a step, before it fills the persistent input buffers that a capture writes to; `capture` is called once, after
the KV cache and the kernels' warm-up; block 0 of the KV cache belongs to no request, and is the one that a capture
writes to.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import Any

import torch
from vllm.compilation import monitor
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.worker.gpu import cudagraph_utils as upstream

from vllm_compile_ext.cuda_graphs import coverage, memory, ranks
from vllm_compile_ext.cuda_graphs.memory import PIECEWISE
from vllm_compile_ext.cuda_graphs.session import Device, Session, Shape, Times
from vllm_compile_ext.replace import replace

logger = logging.getLogger(__name__)


# The arguments of `dispatch`, which `_is_compatible` takes in the same order (vLLM 0.32.0).
_Batch = namedtuple(
    "_Batch",
    "num_reqs num_tokens uniform_token_count num_active_loras max_query_len num_ubatches",
    defaults=(None, 1),
)


class _OneByOne(upstream.CudaGraphManager):
    """Between upstream's two classes: what `ModelCudaGraphManager.capture` hands on is kept, to capture from later.

    session: None while nothing is captured on demand.
    """

    session: Session | None = None

    def capture(self, create_forward_fn: Any, progress_bar_desc: str = "Capturing CUDA graphs") -> None:
        """At start: capture nothing, only allocate what every graph writes to; or, where that is not covered, all."""
        if not coverage.on_demand(self.vllm_config):
            monitor.set_cudagraph_capturing_enabled(True)
            super().capture(create_forward_fn, progress_bar_desc)
            return
        self._create_forward_fn = create_forward_fn
        self._stream = torch.cuda.Stream(device=self.device)
        self._addresses = ranks.Addresses()
        device = Device(
            self._capture_everywhere,
            self._measure,
            free=lambda: int(torch.cuda.mem_get_info()[0]),
            reserved=torch.cuda.memory_reserved,
            give_back=torch.cuda.empty_cache,
            agree=ranks.all_agree,
            from_first=ranks.from_first,
            keep=memory.Writer().put,
        )
        budget = memory.take_budget(self.vllm_config)
        free, reserved = device.free(), device.reserved()
        self._allocate_outputs()
        # At most what torch took and a workspace or two: another process may take memory of the device meanwhile.
        budget.base = max(0, min(free - device.free(), device.reserved() - reserved + 2 * memory.BASE))
        every: dict[Any, list[Any]] = self._capture_descs  # type: ignore[has-type]
        shapes = [shape_of(desc) for descs in every.values() for desc in descs]
        self.session = Session(shapes, budget, device)
        self._graphs_captured = True  # upstream's dispatch looks for a graph from here on
        monitor.set_cudagraph_capturing_enabled(False)

    def _allocate_outputs(self) -> None:
        """Upstream allocates the buffer of the model's outputs at the first forward pass: run the largest size of each
        kind, the largest of all first, and in the memory that graphs will use."""
        largest = [max(descs, key=lambda d: d.num_tokens) for descs in self._capture_descs.values()]
        with between_steps(self._stream), upstream.graph_capture(device=self.device), in_pool(self.pool):
            for desc in sorted(largest, key=lambda d: -d.num_tokens):
                self._create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's choice where its graph is there or is captured now, else a captured larger one, else none."""
        best = super().dispatch(*args, **kwargs)
        if self.session is None or best.cg_mode == CUDAGraphMode.NONE:
            return best
        batch = _Batch(*args, **kwargs)
        wanted, captured, barred = shape_of(best), self.session.policy.captured, self.session.policy.barred

        def fits(shape: Shape) -> bool:
            return bool(upstream._is_compatible(shape.rest, *batch))

        try:
            if wanted in barred:  # upstream's next choice, if there is one
                others = map(shape_of, self._candidates.get((batch.num_tokens, batch.num_active_loras), ()))
                wanted = next((shape for shape in others if fits(shape) and shape not in barred), wanted)
            chosen = self.session.choose_graph(wanted, filter(fits, captured))
        except Exception as error:  # the batch must run
            if ranks.several():  # but this rank would wait alone for the others' next vote
                raise
            self.session.stop(error)
            chosen = shape_of(best) if shape_of(best) in captured else None
        if chosen is not None:
            return chosen.rest
        return upstream.BatchExecutionDescriptor(CUDAGraphMode.NONE, batch.num_tokens, batch.num_reqs)  # not padded

    def sleep(self) -> None:
        """The engine sleeps; see `Policy.sleep`."""
        if self.session is not None:
            self.session.policy.sleep()

    def use_gap(self, *, everything: bool) -> bool:
        """Capture or measure one graph while there are no requests; see `Session.use_gap`."""
        return self.session is not None and self.session.use_gap(everything=everything)

    def _capture_everywhere(self, shape: Shape) -> Exception | None:
        """Capture `shape` on every rank or on none; the error of this rank, if it had one."""
        error = self._capture_here(shape, warm_up=False)
        alike = self._addresses.exchange()
        succeeded = ranks.all_agree(error is None)
        if succeeded and alike:
            return None
        self._forget(shape)
        if ranks.several():  # a pass of this rank alone would wait for the others for ever
            why = "ranks captured different calls of all-reduce" if succeeded else "it failed on another rank"
            return error or ranks.RanksDifferError(why)
        # Something was set up for the first time, which a capture does not allow.
        logger.debug("capturing %s failed, trying once more after a forward pass: %s", shape.rest, error)
        again: Exception | None = self._capture_here(shape, warm_up=True)
        if again is not None:
            self._forget(shape)
        return again

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _capture_here(self, shape: Shape, *, warm_up: bool) -> Exception | None:
        def without_warm_up(desc: Any, warmup: bool) -> Any:
            # Upstream runs a forward pass before each capture; here all kernels have run before, most of the time.
            forward = self._create_forward_fn(desc, warmup)
            return (lambda mode: None if mode == CUDAGraphMode.NONE else forward(mode)) if warmup else forward

        descs: dict[Any, list[Any]] = self._capture_descs  # type: ignore[has-type]
        self._capture_descs = {shape.rest.cg_mode: [shape.rest]}
        try:
            with between_steps(self._stream, self._addresses.changes):
                super().capture(self._create_forward_fn if warm_up else without_warm_up)
        except Exception as error:  # whatever a kernel raises: the batch runs without a graph
            return error
        finally:
            self._capture_descs = descs
        return None

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _measure(self, shape: Shape) -> Times | None:
        """The times of a step whose graph is there, with inputs as for a capture."""

        def microseconds(run: Callable[[], None]) -> int:
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return max(1, round((time.perf_counter() - start) * 1e6))

        piecewise = shape.kind == PIECEWISE
        try:
            # As in a step: all-reduce would only pretend, were it told that a graph is captured.
            with between_steps(self._stream), torch.cuda.stream(self._stream):
                forward = self._create_forward_fn(shape.rest, warmup=False)
                replay = partial(forward, CUDAGraphMode.PIECEWISE) if piecewise else self.graphs[shape.rest].replay
                return Times(microseconds(replay), microseconds(partial(forward, CUDAGraphMode.NONE)))
        except Exception as error:
            logger.debug("%s is not measured", shape.rest, exc_info=error)
            return None

    def _forget(self, shape: Shape) -> None:
        """Drop what there is of `shape`, and leave torch's allocator as it was."""
        self.graphs.pop(shape.rest, None)
        descriptor = BatchDescriptor(num_tokens=shape.tokens, num_active_loras=shape.rest.num_active_loras)
        if shape.kind == PIECEWISE:
            for wrapper in list(CUDAGraphWrapper._all_instances):
                wrapper.concrete_cudagraph_entries.pop(descriptor, None)
            if self.breakable_cg_runner is not None:
                self.breakable_cg_runner.entries.pop(descriptor, None)
        mend_pool(self.pool)


class OnDemandManager(upstream.ModelCudaGraphManager, _OneByOne):
    """Takes the place of `ModelCudaGraphManager` in the V2 model runner."""


def shape_of(desc: Any) -> Shape:
    """The session's name for upstream's `BatchExecutionDescriptor`; kinds have the names of upstream's modes."""
    return Shape(desc.cg_mode.name, desc.num_tokens, desc)


# --- the state of torch and vLLM in which upstream's capture may run between steps


@contextmanager
def between_steps(stream: torch.cuda.Stream, changes: Iterable[tuple[Any, str, Any]] = ()) -> Iterator[None]:
    """Let upstream capture on `stream`, quietly, with `changes`, given as (object, attribute, value).  Waits for the
    device before and after."""

    @contextmanager
    def graph_capture(device: torch.device) -> Iterator[None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield

    prepare_inputs = upstream.prepare_inputs_to_capture

    def prepare_inputs_to_capture(*args: Any, **kwargs: Any) -> Any:
        state = prepare_inputs(*args, **kwargs)
        if not kwargs["full_cudagraph"]:
            for layer in (state.attn_metadata or {}).values():
                if hasattr(layer, "max_num_splits"):
                    layer.max_num_splits = 1
                    layer.scheduler_metadata = None  # made for more
        return state

    state = [
        # vLLM's guard against captures at the wrong time is open only here.
        (monitor, "cudagraph_capturing_enabled", True),
        # One stream for all captures: cuBLAS keeps a workspace for each, and graphs of one pool share memory only on
        # one stream.  Ranks exchange addresses later than in upstream's: see `ranks.Addresses`.
        (upstream, "graph_capture", graph_capture),
        # Attention runs beside a PIECEWISE graph's pieces, and FLASH_ATTN would take memory for up to 32 partial
        # results of each token (flash_attn.py: max_num_splits; 0.5 MiB a token for Llama 8B), which torch then keeps
        # for `stream` alone.  What it computes there is not used, so one has to do.
        (upstream, "prepare_inputs_to_capture", prepare_inputs_to_capture),
        (upstream, "tqdm", lambda items, **_: items),
        # Other threads of a serving worker copy outputs and wait for events meanwhile, and this one may load a kernel
        # for the first time: neither is a reason to break the capture off.
        (torch.cuda, "graph", partial(torch.cuda.graph, capture_error_mode="relaxed")),
        (torch.cuda, "CUDAGraph", _relaxed(torch.cuda.CUDAGraph)),
        # The next steps need the caches of memory.
        (torch.cuda, "empty_cache", lambda: None),
        (torch._C, "_host_emptyCache", lambda: None),
    ]
    with gpu_sync_allowed(), ExitStack() as undos:
        for owner, name, value in [*state, *changes]:
            undos.callback(replace(owner, name, partial(_instead, value)))
        torch.cuda.synchronize()
        undos.callback(torch.cuda.synchronize)
        if gc.isenabled():
            gc.disable()
            undos.callback(gc.enable)
        yield


@cache
def _relaxed(graph: Any) -> Any:
    """For breakable graphs, which do not use `torch.cuda.graph` (vllm/compilation/breakable_cudagraph.py, 0.32.0)."""

    class Relaxed(graph):
        def capture_begin(self, pool: Any = None, capture_error_mode: str = "relaxed", **options: Any) -> None:
            super().capture_begin(pool, capture_error_mode, **options)

    return Relaxed


def _instead(value: Any, stock: Any) -> Any:
    return value


@contextmanager
def in_pool(pool: Any) -> Iterator[None]:
    """Allocate from the graphs' pool: what is freed again is there for graphs, the largest size first, as in stock's
    order of captures.  The pool is kept for good; releasing it would forbid captures into it."""
    device = torch.cuda.current_device()
    torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    try:
        yield
    finally:
        torch._C._cuda_endAllocateToPool(device, pool)


def mend_pool(pool: Any) -> None:
    """After a capture that broke off: torch does not close the pool it allocated from (`CUDAGraph::capture_end` raises
    before it does, torch 2.13), and would neither take another capture into it nor give back unused memory any more."""
    with suppress(RuntimeError):  # it was not open
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
