"""vLLM's own `vllm.compilation`, whatever is swapped: ``from vllm_compile_ext.upstream import backends``.

`vllm_compile_ext.finder` says which module object each name stands for.
"""

from __future__ import annotations

import importlib
from typing import Any

from vllm_compile_ext import finder

__path__: list[str] = []  # a package, whose modules the finder serves
finder.install()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
