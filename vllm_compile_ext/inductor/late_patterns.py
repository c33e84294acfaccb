"""Inductor's patterns are made when something compiles, not in every start.

vLLM 0.32.0 has `GPUWorker.compile_or_warm_up_model` (v1/worker/gpu_worker.py) make them, so that a compilation while
serving finds them there: 0.6 s and 34 modules on an H100, also where all compiled code was loaded.  They synchronize
with the device, so that a run that looks for that (VLLM_GPU_SYNC_CHECK) still makes them at its start.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_compile_ext import after_import


def install() -> Callable[[], None]:
    """Change vLLM's module when it is imported."""
    return after_import.install({"vllm.compilation.compiler_interface": _change})


def _change(module: ModuleType) -> Callable[[], None]:
    def around(stock: Callable[..., None]) -> Callable[..., None]:
        def trigger_inductor_lazy_init(*args: Any, **kwargs: Any) -> None:
            import vllm.envs

            if vllm.envs.VLLM_GPU_SYNC_CHECK:
                stock(*args, **kwargs)

        return trigger_inductor_lazy_init

    return after_import.replace(module, "trigger_inductor_lazy_init", around)
