"""vLLM's `ModelCudaGraphManager`, capturing on demand.

Facts from vllm/v1/worker/gpu/cudagraph_utils.py and model_runner.py, vLLM 0.32.0: the runner calls `dispatch` at the
start of a step, before it fills the persistent input buffers that a capture writes to; `capture` is called once, after
the KV cache and the kernels' warm-up; block 0 of the KV cache belongs to no request, and is the one that a capture
writes to.
"""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import torch
from vllm.compilation import monitor
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.worker.gpu import cudagraph_utils as upstream

from vllm_compile_ext.cuda_graphs import capture, coverage, memory, ranks
from vllm_compile_ext.cuda_graphs.addresses import Addresses
from vllm_compile_ext.cuda_graphs.budget import BASE
from vllm_compile_ext.cuda_graphs.policy import FULL, PIECEWISE, Shape
from vllm_compile_ext.cuda_graphs.session import Device, RanksDifferError, Session

logger = logging.getLogger(__name__)

_KINDS = {CUDAGraphMode.FULL: FULL, CUDAGraphMode.PIECEWISE: PIECEWISE}


# What upstream's `dispatch` is asked with, in the order in which its `_is_compatible` takes it.
_Batch = namedtuple(
    "_Batch",
    "num_reqs num_tokens uniform_token_count num_active_loras max_query_len num_ubatches",
    defaults=(None, 1),
)


def shape_of(desc: Any) -> Shape:
    """The policy's name for upstream's `BatchExecutionDescriptor`."""
    return Shape(_KINDS[desc.cg_mode], desc.num_tokens, desc)


class _OneByOne(upstream.CudaGraphManager):
    """Between upstream's two classes: what `ModelCudaGraphManager.capture` hands on is kept, to capture from later.

    session: None while nothing is captured on demand.
    """

    session: Session | None = None

    def capture(self, create_forward_fn: Any, progress_bar_desc: str = "Capturing CUDA graphs") -> None:
        """At start: capture nothing, only allocate what every graph writes to; or, where that is not covered, all."""
        if not coverage.on_demand(self.vllm_config):
            coverage.say(self.vllm_config)
            monitor.set_cudagraph_capturing_enabled(True)
            super().capture(create_forward_fn, progress_bar_desc)
            return
        self._create_forward_fn = create_forward_fn
        self._stream = torch.cuda.Stream(device=self.device)
        self._addresses = Addresses()
        every: dict[Any, list[Any]] = self._capture_descs  # type: ignore[has-type]
        shapes = [shape_of(desc) for descs in every.values() for desc in descs]
        device = Device(
            self._capture,
            capture.free_memory,
            capture.reserved_memory,
            capture.give_back,
            ranks.all_agree,
            ranks.from_first,
        )
        free, reserved = capture.free_memory(), capture.reserved_memory()
        self._allocate_outputs()
        # At most what torch took and a workspace or two: another process may take memory of the device meanwhile.
        base = max(0, min(free - capture.free_memory(), capture.reserved_memory() - reserved + 2 * BASE))
        known = memory.Memory(self.vllm_config, shapes)
        self.session = Session(known, memory.layers(self.vllm_config), device, base)
        self._graphs_captured = True  # upstream's dispatch looks for a graph from here on
        monitor.set_cudagraph_capturing_enabled(False)

    def _allocate_outputs(self) -> None:
        """Upstream allocates the buffer of the model's outputs at the first forward pass: run the largest size of each
        kind, the largest of all first, and in the memory that graphs will use."""
        largest = [max(descs, key=lambda d: d.num_tokens) for descs in self._capture_descs.values()]
        with (
            capture.between_steps(upstream, self._stream),
            upstream.graph_capture(device=self.device),
            capture.in_pool(self.pool, self.device),
        ):
            for desc in sorted(largest, key=lambda d: -d.num_tokens):
                self._create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's choice where its graph is there or is captured now, else a captured larger one, else none."""
        batch, best = _Batch(*args, **kwargs), super().dispatch(*args, **kwargs)
        if self.session is None or best.cg_mode == CUDAGraphMode.NONE:
            return best
        fits = batch._replace(num_active_loras=best.num_active_loras)
        try:
            chosen = self.session.graph_for(self._best_left(best, fits), self._captured(fits))
        except Exception as error:  # the batch must run
            if ranks.several():  # but this rank would wait alone for the others' next vote
                raise
            self.session.stop(error)
            chosen = shape_of(best) if shape_of(best) in self.session.policy.captured else None
        return self._no_graph(best, batch) if chosen is None else chosen.rest

    def _best_left(self, best: Any, fits: _Batch) -> Shape:
        """`best`, or upstream's next choice when that can have no graph."""
        assert self.session is not None
        barred = self.session.policy.barred
        shape = shape_of(best)
        if shape not in barred:
            return shape
        others = self._candidates.get((fits.num_tokens, best.num_active_loras), [])
        shapes = [shape_of(d) for d in others if upstream._is_compatible(d, *fits)]
        return next((s for s in shapes if s not in barred), shape)

    def _captured(self, fits: _Batch) -> Iterator[Shape]:
        assert self.session is not None
        return (s for s in self.session.policy.captured if upstream._is_compatible(s.rest, *fits))

    @staticmethod
    def _no_graph(best: Any, batch: _Batch) -> Any:
        size = {"num_tokens": batch.num_tokens, "num_reqs": batch.num_reqs}  # not padded
        rest = {"num_active_loras": best.num_active_loras, "num_ubatches": best.num_ubatches}
        return upstream.BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, **size, **rest)

    def _capture(self, shape: Shape) -> Exception | None:
        """Capture `shape` on every rank or on none; the error of this rank, if it had one."""
        error = self._try(shape, warm_up=False)
        alike = self._addresses.exchange()
        succeeded = ranks.all_agree(error is None)
        if succeeded and alike:
            return None
        self._forget(shape)
        if ranks.several():  # a pass of this rank alone would wait for the others for ever
            there = "ranks captured different calls of all-reduce" if succeeded else "it failed on another rank"
            return error or RanksDifferError(there)
        # Something was set up for the first time, which a capture does not allow.
        logger.debug("capturing %s failed, trying once more after a forward pass: %s", shape.rest, error)
        again: Exception | None = self._try(shape, warm_up=True)
        if again is not None:
            self._forget(shape)
        return again

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _try(self, shape: Shape, *, warm_up: bool) -> Exception | None:
        descs: dict[Any, list[Any]] = self._capture_descs  # type: ignore[has-type]
        self._capture_descs = {shape.rest.cg_mode: [shape.rest]}
        try:
            with capture.between_steps(upstream, self._stream), self._addresses.open():
                super().capture(self._create_forward_fn if warm_up else self._without_warm_up)
        except Exception as error:  # whatever a kernel raises: the batch runs without a graph
            return error
        finally:
            self._capture_descs = descs
        return None

    def _without_warm_up(self, desc: Any, warmup: bool) -> Any:
        """Upstream runs a forward pass before each capture; here all kernels have run before, most of the time."""
        forward = self._create_forward_fn(desc, warmup)
        if not warmup:
            return forward
        return lambda mode: None if mode == CUDAGraphMode.NONE else forward(mode)

    def _forget(self, shape: Shape) -> None:
        """Drop what there is of `shape`, and leave torch's allocator as it was."""
        self.graphs.pop(shape.rest, None)
        descriptor = BatchDescriptor(num_tokens=shape.tokens, num_active_loras=shape.rest.num_active_loras)
        if shape.kind == PIECEWISE:
            for wrapper in list(CUDAGraphWrapper._all_instances):
                wrapper.concrete_cudagraph_entries.pop(descriptor, None)
        capture.mend(self.pool, self.device)

    def capture_idle(self, *, remembered: bool = False) -> bool:
        """Capture the likeliest shape that is left, while there are no requests; False when there is none.  With
        `remembered`, only before the first request, and of those that earlier starts used."""
        return self.session is not None and self.session.capture_idle(remembered=remembered)


class OnDemandManager(upstream.ModelCudaGraphManager, _OneByOne):
    """Takes the place of `ModelCudaGraphManager` in the V2 model runner."""
