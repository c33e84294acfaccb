"""What takes the place of functions of torch and vLLM beside the replaced modules; standard library only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def look_up_functions(stock: Callable[..., Any]) -> Callable[..., Any]:
    """For `torch._TorchCompileInductorWrapper.__call__`: see `functions.py`."""

    def __call__(self: Any, graph: Any, inputs: Any, *, config_patches: Any = None) -> Any:  # noqa: N807
        import torch

        def compile_it() -> Any:
            return stock(self, graph, inputs, config_patches=config_patches)

        if type(self) is not torch._TorchCompileInductorWrapper or torch._functorch.config.bypass_autograd_cache_key:
            return compile_it()  # to be saved ahead of time, by who asks for it
        from vllm_compile_ext.compilation import functions

        is_plain = not config_patches and not self.name
        return functions.load_or_compile(compile_it, graph, inputs, self.config if is_plain else None)

    return __call__


def make_patterns_late(stock: Callable[..., None]) -> Callable[..., None]:
    """For `vllm.compilation.compiler_interface.trigger_inductor_lazy_init`: Inductor's patterns are made when something
    compiles, not in every start.

    vLLM 0.32.0 has `GPUWorker.compile_or_warm_up_model` (v1/worker/gpu_worker.py) make them, so that a compilation
    while serving finds them there: 0.6 s and 34 modules on an H100, also where all compiled code was loaded.  They
    synchronize with the device, so that a run that looks for that (VLLM_GPU_SYNC_CHECK) makes them at its start.
    """

    def trigger_inductor_lazy_init(*args: Any, **kwargs: Any) -> None:
        import vllm.envs

        if vllm.envs.VLLM_GPU_SYNC_CHECK:
            stock(*args, **kwargs)

    return trigger_inductor_lazy_init
