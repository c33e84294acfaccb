"""In the place of upstream's capture while it profiles memory: a figure that costs one forward pass, or none."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode

from vllm_compile_ext import harmless
from vllm_compile_ext.cuda_graphs import coverage, memory, ranks

logger = logging.getLogger(__name__)


def around(stock: Callable[[Any], int]) -> Callable[[Any], int]:
    """`profile_cudagraph_memory`, which is `stock` where graphs are not captured on demand."""

    @functools.wraps(stock)
    def profile_cudagraph_memory(runner: Any) -> int:
        config = runner.vllm_config
        if config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            return 0
        covered, size, error = True, 0, None
        try:
            covered = coverage.on_demand(config)
            size = memory.keep_free(config, lambda: _activations(runner)) if covered else 0
        except Exception as caught:
            error = caught
        if covered:
            if ranks.all_agree(error is None):
                return size
            coverage.give_up(config)
            why = "another rank has no figure for them" if error is None else harmless.error(error)
            logger.warning("CUDA graphs are captured at start, as in stock vLLM (%s)", why)
            logger.debug("no figure for CUDA graphs", exc_info=error)
        return stock(runner)

    return profile_cudagraph_memory


def _activations(runner: Any) -> int:
    """Peak bytes of a forward pass at the largest size that has a graph."""
    size = runner.compilation_config.max_cudagraph_capture_size
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner._dummy_run(size, skip_attn=True, is_profile=True, skip_eplb=True)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    return int(peak - before)
