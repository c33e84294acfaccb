"""Where graphs are captured on demand, and where stock's capture at start stays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.config import CUDAGraphMode

from vllm_compile_ext import settings

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One line of the table in docs/cudagraphs.md.  what: an option, as people name it.  why: the reason for stock's
    capture.  takes: what it would take to do without.  holds: true of a `VllmConfig` with it."""

    what: str
    why: str
    takes: str
    holds: Callable[[Any], Any]


STOCK = (
    Row(
        "the V1 model runner",
        "it captures within the step that asks for a graph",
        "the V2 model runner, which 0.33 takes for all but a few settings",
        lambda c: not c.use_v2_model_runner,
    ),
    Row(
        "DBO and micro-batches",
        "a capture parks the micro-batches' threads",
        "a capture of all parts at once, in their threads' stream",
        lambda c: c.parallel_config.use_ubatching,
    ),
    Row(
        "speculative decoding whose drafts have graphs (EAGLE, MTP, DFlash, ...)",
        "drafts read what the target's graph was given, and may run on one only where the target does",
        "drafts captured at start, profiled beside ours, and bound to the target's choice",
        lambda c: c.speculative_config is not None and not _drafts_without_graphs(c.speculative_config),
    ),
    Row(
        "LoRA",
        "dummy adapters are loaded for a capture, which would evict those of running requests",
        "a dummy mapping instead of adapters, and the real one written again after each capture",
        lambda c: c.lora_config is not None,
    ),
    Row(
        "graphs of encoders (`cudagraph_mm_encoder`)",
        "they are captured by budget, not by batch",
        "those at start, and their memory profiled beside ours",
        lambda c: c.compilation_config.cudagraph_mm_encoder,
    ),
    Row(
        "data parallel ranks that step together",
        "a rank that captures would be alone in the experts' collectives",
        "votes of all ranks, in the second of a step's two decisions",
        lambda c: c.parallel_config.data_parallel_size > 1,
    ),
    Row(
        "pipeline parallelism",
        "a stage that captures holds up the others",
        "a stage never on a larger graph than the stage before it",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    Row(
        "context parallelism (PCP, DCP)",
        "its dummy batches touch state of running requests",
        "unknown",
        lambda c: (
            c.parallel_config.prefill_context_parallel_size > 1 or c.parallel_config.decode_context_parallel_size > 1
        ),
    ),
    Row(
        "elastic EP and EPLB",
        "experts move while serving, and a dummy pass would be counted as load",
        "unknown",
        lambda c: c.parallel_config.enable_eplb or c.parallel_config.enable_elastic_ep,
    ),
    Row(
        "KV cache connectors",
        "their threads use the device while a graph is captured",
        "one of them at a time, disabled during captures and tried",
        lambda c: c.kv_transfer_config is not None,
    ),
    Row(
        "weights offloaded to the CPU",
        "a dummy pass in between would move the weights that the next step has prefetched",
        "unknown",
        lambda c: c.offload_config.uva.cpu_offload_gb or c.offload_config.prefetch.offload_group_size,
    ),
    Row(
        "sleep mode that offloads graphs (`sleep_mode_offload_cudagraph`)",
        "graphs live in a pool of its own",
        "captures into that pool",
        lambda c: c.use_cumem_cudagraph_pool,
    ),
    Row(
        "Inductor's graph partition (`use_inductor_graph_partition`)",
        "a capture reclaims the storages of earlier ones",
        "unknown",
        lambda c: c.compilation_config.use_inductor_graph_partition,
    ),
    Row(
        "fast prefill with shared KV (`kv_sharing_fast_prefill`)",
        "it asks for a second graph within a step",
        "unknown",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
    ),
    Row(
        "attention backends other than FLASH_ATTN and TRITON_ATTN",
        "a capture at start finds the size of their workspaces",
        "every size of a decode step run once at start, and before its capture",
        lambda c: not _backends(c) <= {"FLASH_ATTN", "TRITON_ATTN"},
    ),
    Row(
        "prompts in graphs of whole steps (`cudagraph_mode=FULL`)",
        "such a graph is as large as a decode step's and as rarely used as a prompt's",
        "nothing but a measurement that it pays",
        lambda c: c.compilation_config.cudagraph_mode.mixed_mode().name == "FULL",
    ),
    Row(
        "all-reduce kernels of FlashInfer (PCIe) and AITER",
        "they have to be told when a capture begins and ends",
        "telling them",
        lambda c: c.parallel_config.tensor_parallel_size > 1 and _exchanges(),
    ),
    Row(
        "HiSparse",
        "its residency state is on the device",
        "unknown",
        lambda c: c.attention_config.hisparse_config is not None,
    ),
    Row(
        "the Proton profiler",
        "it has to see graphs being captured",
        "nothing where it does not attribute the kernels of graphs",
        lambda c: c.profiler_config.profiler == "proton",
    ),
    Row(
        "`--jit-monitor-mode error`",
        "a capture may compile kernels",
        "nothing: this mode is for finding what is compiled while serving",
        lambda c: c.observability_config.jit_monitor_mode == "error",
    ),
)


# Ids of configurations for which profiling memory met a surprise: their start goes on as in stock vLLM.
_given_up: set[int] = set()


def stock_because(config: Any) -> str | None:
    """The first row that holds for `config`, as a phrase; None where graphs can be captured on demand."""
    return next((f"{row.what}: {row.why}" for row in STOCK if row.holds(config)), None)


def why_at_start(config: Any) -> str | None:
    """Why no graph is captured on demand: not asked for, or not covered; None where they are."""
    return _not_asked_for(config) or stock_because(config)


def on_demand(config: Any) -> bool:
    """Whether graphs are captured on demand."""
    return why_at_start(config) is None


def give_up(config: Any) -> None:
    """From here on graphs of `config` are captured as in stock vLLM."""
    _given_up.add(id(config))


def say(config: Any) -> None:
    """Log why graphs are captured at start, where that was not asked for."""
    if not _not_asked_for(config) and (reason := stock_because(config)):
        logger.info("CUDA graphs are captured at start, as in stock vLLM, with %s", reason)


def _not_asked_for(config: Any) -> str | None:
    if id(config) in _given_up:
        return "profiling their memory met a surprise"
    if settings.of(config).VLLM_COMPILE_CUDAGRAPHS == "eager":
        return "VLLM_COMPILE_CUDAGRAPHS=eager"
    return "cudagraph_mode NONE" if config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE else None


def _drafts_without_graphs(speculative: Any) -> bool:
    """Of the V2 model runner (vllm/v1/worker/gpu/spec_decode/, 0.32.0 and 0.33): the target alone has graphs, and none
    is run to find out what a step costs."""
    return (
        speculative.method in ("ngram", "ngram_gpu", "draft_model", "extract_hidden_states")
        and not speculative.enable_adaptive_verification
    )


def _backends(config: Any) -> set[str]:
    """Names of the attention backends of the model's layers, as far as they are made."""
    layers = config.compilation_config.static_forward_context.values()
    return {str(layer.get_attn_backend().get_name()) for layer in layers if hasattr(layer, "get_attn_backend")}


def _exchanges() -> bool:
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():  # a configuration that is only looked at
        return False
    communicator = parallel_state.get_tp_group().device_communicator
    return any(getattr(communicator, name, None) is not None for name in ("fi_pcie_ipc_ar_comm", "aiter_ar_comm"))


def markdown() -> str:
    """The table as docs/cudagraphs.md has it."""
    rows = [f"| {row.what} | {row.why} | {row.takes} |" for row in STOCK]
    return "\n".join(["| with | stock's capture stays, because | what it would take |", "|---|---|---|", *rows]) + "\n"
