"""Which compilations go the plugin's own way, traced once and each distinct piece compiled once, and which do not.

Everything else is upstream's, unchanged; `why_upstream` is the whole rule.
"""

from __future__ import annotations

from typing import Any


def why_upstream(vllm_config: Any) -> str | None:
    """Why a model of this configuration is compiled by upstream's path, or None for the plugin's own.

    Encoders, draft heads (`model_tag`), pipeline stages, compile sizes and ranges, custom passes and CUDA graphs need
    no rule: the plugin's path hands every piece to upstream's `PiecewiseBackend`, which knows them.
    """
    import torch._inductor.config
    import vllm.envs
    from vllm.config import CompilationMode

    compilation = vllm_config.compilation_config
    options = compilation.inductor_compile_config
    rules = (
        # Nothing is to be read or kept; without its caches torch does not compile ahead of time (torch 2.13.0,
        # `_dynamo/eval_frame.py: aot_compile`).
        (vllm.envs.VLLM_DISABLE_COMPILE_CACHE, "VLLM_DISABLE_COMPILE_CACHE=1"),
        (
            torch._inductor.config.force_disable_caches or options.get("force_disable_caches", False),
            "torch's compile caches are off (force_disable_caches)",
        ),
        (compilation.mode != CompilationMode.VLLM_COMPILE, f"mode {getattr(compilation.mode, 'name', None)}"),
        (not vllm.envs.VLLM_USE_AOT_COMPILE, "VLLM_USE_AOT_COMPILE=0"),
        (not vllm.envs.VLLM_USE_MEGA_AOT_ARTIFACT, "VLLM_USE_MEGA_AOT_ARTIFACT=0"),
        (not vllm.envs.VLLM_USE_STANDALONE_COMPILE, "VLLM_USE_STANDALONE_COMPILE=0"),
        (compilation.backend != "inductor", f"backend {compilation.backend!r}"),
        (compilation.use_inductor_graph_partition, "use_inductor_graph_partition: Inductor splits the whole graph"),
        (compilation.cudagraph_copy_inputs, "cudagraph_copy_inputs: inputs go through buffers of the whole graph"),
        (compilation.dynamic_shapes_config.evaluate_guards, "evaluate_guards: every guard of a full trace is wanted"),
    )
    return next((reason for applies, reason in rules if applies), None)
