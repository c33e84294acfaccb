"""vLLM's post-grad passes as far as CPU can run them."""

from __future__ import annotations

from typing import Any

from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.compilation.passes.pass_manager import PostGradPassManager


class LeaveFunctionalized(InductorPass):
    """Stands in for `FixFunctionalizationPass`, which names GPU operators that CPU builds do not register
    ("'_OpNamespace' '_C' object has no attribute 'fused_add_rms_norm_static_fp8_quant'", vLLM 0.32.0, on processors
    where linear layers are oneDNN operators).  Inductor's own pass, which runs later, undoes the functionalization.
    """

    def __call__(self, graph: Any) -> None:
        pass


class CpuPassManager(PostGradPassManager):
    """Upstream's pass manager for CPU; passes that the user added run as they do elsewhere."""

    def configure(self, config: Any) -> None:
        super().configure(config)
        self.fix_functionalization = LeaveFunctionalized()
