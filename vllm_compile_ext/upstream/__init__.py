"""vLLM's own `vllm.compilation`, whatever is swapped: ``from vllm_compile_ext.upstream import backends``.

`vllm_compile_ext.swap` says which module object each name stands for.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from vllm_compile_ext.swap import SwapFinder, installed

if not installed():
    # Last on the path and with nothing to replace: only the upstream names are served.
    sys.meta_path.append(SwapFinder(()))


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
