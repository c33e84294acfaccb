"""Records a start from its first moment: the file ``vllm_compile_ext.pth``, which Python reads when it starts, calls
`begin` in processes that look like vLLM's.

Standard library only, and little of it: this is imported before anything else is.
"""

from __future__ import annotations

import os

from vllm_compile_ext import finder

TYPE_CHECKING = False  # of `typing`, which takes milliseconds to import
if TYPE_CHECKING:
    from typing import Any

_SWITCHES = ("VLLM_COMPILE_EXT", "VLLM_COMPILE_STARTS")
_OFF = ("0", "false", "no", "off")


def begin() -> None:
    """Time imports from here on, and record vLLM's own spans from its first on, unless a variable says no."""
    if finder.finder.timing or off():
        return
    finder.finder.timing = True
    finder.install().after("vllm.tracing.otel", _record)


def off() -> bool:
    """Whether a variable switches the record off.  A value that cannot be read is for the plugin to complain about."""
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "compile_ext" not in plugins.split(","):
        return True
    return any(os.environ.get(name, "").strip().lower() in _OFF for name in _SWITCHES)


def _record(tracing: Any) -> None:
    from vllm_compile_ext.record import recorder, vllm_spans

    tracing.trace = vllm_spans.trace(tracing.trace)
    recorder.begin()
