"""Capturing while there are no requests, one graph at a time: all of them, or, before the first request, those that
earlier starts used.

vllm/v1/engine/core.py, vLLM 0.32.0: the engine core's loop calls `_notify_idle_state_callbacks` whenever it has no
work, just before it waits for the next request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm_compile_ext import after_import, harmless, settings

logger = logging.getLogger(__name__)


def install(core: type) -> Callable[[], None]:
    """Capture in `core` (`EngineCoreProc`) whenever it is idle, until all shapes are captured."""

    def around(stock: Callable[[Any], None]) -> Callable[[Any], None]:
        def notify(self: Any) -> None:
            stock(self)
            capture_while_idle(self)

        return notify

    return after_import.replace(core, "_notify_idle_state_callbacks", around)


def capture_while_idle(core: Any) -> None:
    """Capture until a request arrives or nothing is left.  Never raises: idle capture is then over."""
    try:
        policy = settings.load().VLLM_COMPILE_CUDAGRAPHS
        if policy == "eager" or not getattr(core, "_graphs_left", True):
            return
        while core.input_queue.empty() and _may_capture(core):
            left = core.model_executor.collective_rpc(capture_in_worker, args=(policy == "lazy",))
            if not any(left):
                core._graphs_left = None in left
                return
    except Exception as error:
        core._graphs_left = False
        logger.warning("CUDA graphs are not captured while idle any more (%s)", harmless.error(error))
        logger.debug("what stopped the capture while idle", exc_info=True)


def _may_capture(core: Any) -> bool:
    # A scheduler is paused while weights are updated: layers may be without any.
    return core.is_running() and not core.is_scheduler_paused() and not core.model_executor.is_sleeping


def capture_in_worker(worker: Any, remembered: bool) -> bool | None:
    """One capture in a worker; False when there is nothing left, None when it is not the time."""
    if getattr(worker, "_weight_update_active", False):
        return None
    manager = getattr(getattr(worker, "model_runner", None), "cudagraph_manager", None)
    capture_idle = getattr(manager, "capture_idle", None)
    return bool(capture_idle and capture_idle(remembered=remembered))
