"""`vllm.compilation.backends`: upstream's backend, which compiles each distinct piece once, and what CPU needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.platforms import current_platform

from vllm_compile_ext import harmless
from vllm_compile_ext.upstream import backends as upstream

logger = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    return getattr(upstream, name)


class CompilerManager(upstream.CompilerManager):
    """Upstream's manager; a cache that cannot be read costs a warning and a compilation, not the start."""

    def initialize_cache(self, cache_dir: str, disable_cache: bool = False, prefix: str = "") -> None:
        index = Path(cache_dir) / "vllm_compile_cache.py"
        try:
            super().initialize_cache(cache_dir, disable_cache, prefix)
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            logger.warning("compiling again: %s cannot be read (%s)", index, harmless.error(error))
            index.unlink(missing_ok=True)
            super().initialize_cache(cache_dir, disable_cache, prefix)

    def load(self, graph: Any, example_inputs: list[Any], graph_index: int, compile_range: Any) -> Any:
        try:
            return super().load(graph, example_inputs, graph_index, compile_range)
        except Exception as error:
            entry = self.cache.pop((compile_range, graph_index, self.compiler.name), None)
            handle = entry["graph_handle"] if isinstance(entry, dict) else entry
            logger.warning("compiling again: %s cannot be loaded (%s)", handle, harmless.error(error))
            return None


class LeaveFunctionalized(InductorPass):
    """Stands in for `FixFunctionalizationPass`, which names GPU operators that CPU builds do not register
    ("'_OpNamespace' '_C' object has no attribute 'fused_add_rms_norm_static_fp8_quant'", vLLM 0.32.0, on processors
    where linear layers are oneDNN operators).  Inductor's own pass, which runs later, undoes the functionalization.
    """

    def __call__(self, graph: Any) -> None:
        pass


class VllmBackend(upstream.VllmBackend):
    """Upstream's backend; of a model that is traced once it compiles every distinct piece once."""

    def configure_post_pass(self) -> None:
        super().configure_post_pass()
        if current_platform.is_cpu():
            self.pass_manager.fix_functionalization = LeaveFunctionalized()

    def __call__(self, graph: Any, example_inputs: Sequence[Any]) -> Any:
        from vllm_compile_ext.compilation import once

        session = once.current.get()
        if session is None:
            return super().__call__(graph, example_inputs)
        return once.compile_graph(self, graph, example_inputs, session)


# `upstream` is this plugin's own copy of the module: vLLM's is not touched.
upstream.CompilerManager = CompilerManager  # which `VllmBackend` makes
