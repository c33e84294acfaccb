"""CPU: keep the compilation mode that the user asked for.

vLLM 0.32.0's `CpuPlatform.check_and_update_config` turns `CompilationMode.VLLM_COMPILE` into `DYNAMO_TRACE_ONCE`: the
whole graph goes through Inductor as one piece and the result cannot be loaded again ("'function' object has no
attribute 'finalize_loading'"), so that every start compiles.  The piecewise path behind VLLM_COMPILE works on CPU too
and loads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def why_stock(config: Any) -> str | None:
    """Why stock's mode is kept for a `VllmConfig` that asks for VLLM_COMPILE, or None when that mode can be served."""
    import vllm.envs

    if vllm.envs.VLLM_CPU_CI_ENV:
        return "VLLM_CPU_CI_ENV is set"
    if config.lora_config is not None:
        return "LoRA is not compiled on CPU"
    if config.compilation_config.use_inductor_graph_partition:
        return "use_inductor_graph_partition is not covered on CPU"
    return None


def drop_fusions(passes: Any) -> None:
    """Turn vLLM's fusion passes off in a `PassConfig`: they match GPU kernels, and CPU builds do not import them.

    vLLM 0.32.0 turns some on by optimization level without a look at the platform, `fuse_rope_kvcache_cat_mla` for
    splitting_ops of the user's own ("NameError: name 'MLARoPEKVCacheCatFusionPass' is not defined").
    """
    for field in dataclasses.fields(passes):
        if field.name.startswith("fuse_") or field.name == "enable_qk_norm_rope_fusion":
            setattr(passes, field.name, False)


def keep_mode_on_cpu() -> Callable[[], None]:
    """Wrap `CpuPlatform.check_and_update_config`; on any other platform do nothing.  Returns the undo."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return lambda: None
    from vllm.platforms.cpu import CpuPlatform

    upstream = CpuPlatform.__dict__["check_and_update_config"]

    @functools.wraps(upstream.__func__)
    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        from vllm.config import CompilationMode

        compilation = vllm_config.compilation_config
        asked = compilation.mode
        upstream.__func__(cls, vllm_config)
        if asked != CompilationMode.VLLM_COMPILE or compilation.mode == asked:
            return
        if reason := why_stock(vllm_config):
            logger.info("compilation mode stays %s, as in stock vLLM: %s", compilation.mode.name, reason)
            return
        compilation.mode = asked
        drop_fusions(compilation.pass_config)
        if compilation.compile_sizes is None:
            # Left None on platforms without static graphs; the piecewise backend then finds no range for any shape.
            compilation.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)

    def undo() -> None:
        CpuPlatform.check_and_update_config = upstream

    return undo
