"""`vllm.compilation.wrapper`: upstream's; a model is compiled as `start.py` does it, and its bytecode is looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from vllm.config import get_current_vllm_config, set_current_vllm_config

from vllm_compile_ext.compilation import rules, start
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.key import factors
from vllm_compile_ext.program import dump
from vllm_compile_ext.upstream import wrapper as upstream


def __getattr__(name: str) -> Any:
    return getattr(upstream, name)


class TorchCompileWithNoGuardsWrapper(upstream.TorchCompileWithNoGuardsWrapper):
    """Upstream's wrapper of a model.

    kept_by_stock: False for a class of ``@support_torch_compile(use_aot_compile=False)`` (vLLM 0.33.0: models of the
    Transformers backend, since upstream cannot pickle what it makes of them).  This plugin keeps them as any other.
    """

    kept_by_stock = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours = rules.why_upstream(get_current_vllm_config()) is None
        if ours and not getattr(self, "_allow_aot_compile", True):
            self.kept_by_stock, self._allow_aot_compile = False, True
        super().__init__(*args, **kwargs)
        factors.prepare()
        if ours:
            workers.prepare(self.vllm_config, lambda: start.is_new(self))

    def aot_compile(self, *args: Any, **kwargs: Any) -> Any:
        return start.compile_and_keep(self, super().aot_compile, args, kwargs)

    def compile_as_stock(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """What stock runs of a model that it does not keep: compiled by a call, with torch's own caches."""
        self._allow_aot_compile = False
        self.cleanup()
        with set_current_vllm_config(self.vllm_config):
            super().__init__(self._compile_prefix, self._is_encoder)
        call: Callable[..., Any] = upstream.TorchCompileWithNoGuardsWrapper.__call__
        call(self, *args, **kwargs)  # upstream's `monitor_profiling_run`, around the next one, lets nothing compile
        return call

    def bytecode_hook(self, old_code: CodeType, new_code: CodeType) -> None:
        """Keep `new_code` for direct execution if it is this instance's: Dynamo calls the hooks of all instances."""
        if old_code is not self.original_code_object():
            return
        frame = _compiled_frame(old_code)
        if frame is None or frame.f_locals.get("self") is not self:
            return
        self._compiled_bytecode = new_code
        dump.inspect(self, new_code)


def _compiled_frame(old_code: CodeType) -> Any:
    """The frame that Dynamo is compiling, found in the locals of `convert_frame._compile` further up the stack."""
    caller: Any = sys._getframe()
    while caller is not None:
        if (caller.f_code.co_name, Path(caller.f_code.co_filename).name) == ("_compile", "convert_frame.py"):
            compiled = caller.f_locals["frame"]
            return compiled if compiled.f_code is old_code else None
        caller = caller.f_back
    return None
