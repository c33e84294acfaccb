"""Whether imported modules have bytecode: without it, each process that imports them compiles them first."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

COST = 0.0015  # seconds a module: 5,000 in 7.5 s (vLLM on an H200's machine)
WAY_OUT = (
    "run python -m compileall on the site-packages folder, in the image; unset PYTHONDONTWRITEBYTECODE; "
    "or set VLLM_COMPILE_PYCACHE=1"
)


def missing() -> str | None:
    """A sentence, where more than a tenth of the modules that this process has imported leave the next one none."""
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    files = {spec.cached for spec in specs if spec is not None and isinstance(spec.loader, SourceFileLoader)}
    without = sum(1 for file in files if file and not Path(file).exists())
    if without <= len(files) // 10:
        return None
    cost = f"about {without * COST:.0f} s a process"
    return f"{without} of {len(files)} imported modules have no bytecode and are compiled whenever imported: {cost}"
