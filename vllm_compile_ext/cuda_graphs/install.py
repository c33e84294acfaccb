"""Put on-demand capture in the place of stock's: three names in vLLM's V2 model runner and one of the engine core."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

from vllm_compile_ext import after_import

Undo = Callable[[], None]
_UTILS = "vllm.v1.worker.gpu.cudagraph_utils"
_RUNNER = "vllm.v1.worker.gpu.model_runner"
_V1 = "vllm.v1.worker.gpu_model_runner"
_CORE = "vllm.v1.engine.core"


def install() -> Undo:
    """Change the modules as they are imported, on CUDA only."""
    return after_import.install({_UTILS: _utils, _RUNNER: _runner, _V1: _v1, _CORE: _core})


def _cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.version.cuda)


def _utils(module: ModuleType) -> Undo:
    if not _cuda():
        return lambda: None
    from vllm_compile_ext.cuda_graphs import manager, profile

    stock = module.ModelCudaGraphManager, module.profile_cudagraph_memory
    module.ModelCudaGraphManager = manager.OnDemandManager  # type: ignore[attr-defined]
    module.profile_cudagraph_memory = profile.around(stock[1])  # type: ignore[attr-defined]

    def undo() -> None:
        module.ModelCudaGraphManager, module.profile_cudagraph_memory = stock  # type: ignore[attr-defined]

    return undo


def _runner(module: ModuleType) -> Undo:
    """`capture_model` says what is kept free instead of what was captured, which the worker's log lines compare, and
    does not collect garbage for captures that come later."""
    if not _cuda():
        return lambda: None
    from vllm_compile_ext.cuda_graphs import coverage

    def around(stock: Callable[..., int]) -> Callable[..., int]:
        def capture_model(self: Any, *, profile_only: bool = False) -> int:
            if not coverage.on_demand(self.vllm_config):
                return stock(self, profile_only=profile_only)
            with patch.object(module, "freeze_gc_for_cudagraph_capture", nullcontext):
                stock(self, profile_only=profile_only)
            session = getattr(self.cudagraph_manager, "session", None)
            return 0 if session is None else session.budget.base + session.budget.limit

        return capture_model

    return after_import.replace(module.GPUModelRunner, "capture_model", around)


def _v1(module: ModuleType) -> Undo:
    """The V1 model runner captures as ever, after the line that says so."""
    if not _cuda():
        return lambda: None
    from vllm_compile_ext.cuda_graphs import coverage

    def around(stock: Callable[..., Any]) -> Callable[..., Any]:
        def capture_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            coverage.say(self.vllm_config)
            return stock(self, *args, **kwargs)

        return capture_model

    return after_import.replace(module.GPUModelRunner, "capture_model", around)


def _core(module: ModuleType) -> Undo:
    if not _cuda():
        return lambda: None
    from vllm_compile_ext.cuda_graphs import idle

    return idle.install(module.EngineCoreProc)
