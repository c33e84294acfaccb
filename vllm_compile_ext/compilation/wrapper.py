"""`vllm.compilation.wrapper`: upstream's; a model is compiled as `start.py` does it, and its bytecode is looked at."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType
from typing import Any

from vllm_compile_ext.compilation import rules, start
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.key import factors
from vllm_compile_ext.program import dump
from vllm_compile_ext.upstream import wrapper as upstream


def __getattr__(name: str) -> Any:
    return getattr(upstream, name)


class TorchCompileWithNoGuardsWrapper(upstream.TorchCompileWithNoGuardsWrapper):
    """Upstream's wrapper of a model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        factors.prepare()
        if rules.why_upstream(self.vllm_config) is None:
            workers.prepare(lambda: start.is_new(self))

    def aot_compile(self, *args: Any, **kwargs: Any) -> Any:
        return start.compile_and_keep(self, super().aot_compile, args, kwargs)

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
