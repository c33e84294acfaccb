"""What the plugin does from a process's first moment: the file ``vllm_compile_ext.pth``, which Python reads when it
starts, calls `begin` in processes that look like vLLM's.

Standard library only, and little of it: this is imported before anything else is.
"""

from __future__ import annotations

import os
import sys

from vllm_compile_ext import finder, pycache

TYPE_CHECKING = False  # of `typing`, which takes milliseconds to import
if TYPE_CHECKING:
    from typing import Any

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def begin() -> None:
    """Time imports from here on and record vLLM's own spans from its first on; note what a fork could not make up for.

    A variable may say no to either.
    """
    if finder.finder.timing or off("VLLM_COMPILE_EXT"):
        return
    if os.environ.get("VLLM_COMPILE_PYCACHE", "").strip().lower() in _ON:
        pycache.keep()
    if not off("VLLM_COMPILE_STARTS"):
        finder.finder.timing = True
        finder.install().after("vllm.tracing.otel", _record)
    if not off("VLLM_COMPILE_FORK"):
        from vllm_compile_ext.standby import place
        from vllm_compile_ext.zygote import reads

        reads.watch()
        finder.install().after("vllm.tracing.otel", _wait_for_imports)
        if place.program(sys.orig_argv) and os.path.exists(place.socket()):  # noqa: PTH110
            finder.finder.before = _ask_standby


def off(switch: str) -> bool:
    """Whether a variable switches it off.  A value that cannot be read is for the plugin to complain about."""
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "compile_ext" not in plugins.split(","):
        return True
    return os.environ.get(switch, "").strip().lower() in _OFF


def _record(tracing: Any) -> None:
    from vllm_compile_ext.record import recorder, vllm_spans

    tracing.trace = vllm_spans.trace(tracing.trace)
    recorder.begin()


def _ask_standby() -> None:
    from vllm_compile_ext.standby import client

    client.ask()


def _wait_for_imports(tracing: Any) -> None:
    from vllm_compile_ext.zygote import front

    front.wait()
