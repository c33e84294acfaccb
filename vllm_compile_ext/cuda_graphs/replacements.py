"""What takes the place of stock's functions: each function here takes the stock one and returns what replaces it, which
is the stock one itself where there is no CUDA."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from queue import Queue
from typing import Any

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.cuda_graphs import coverage
from vllm_compile_ext.replace import replace

logger = logging.getLogger(__name__)

# Seconds without a request before a graph is captured, once there was one: who sends the next when he has the answer
# to the last is not to wait for a capture.
PATIENCE = 0.1

Function = Callable[..., Any]


def on_cuda(replacement: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Replace only where torch is built for CUDA."""

    def replacement_on_cuda(stock: Any) -> Any:
        import torch  # whatever is replaced has imported it

        return replacement(stock) if torch.version.cuda else stock

    return replacement_on_cuda


@on_cuda
def graph_manager(stock: type) -> type:
    """`ModelCudaGraphManager` of the V2 model runner."""
    from vllm_compile_ext.cuda_graphs.manager import OnDemandManager

    return OnDemandManager


@on_cuda
def profile_cudagraph_memory(stock: Function) -> Function:
    from vllm_compile_ext.cuda_graphs import memory

    return lambda runner: memory.profile(stock, runner)


@on_cuda
def capture_model(stock: Function) -> Function:
    """Of both model runners.  Where graphs are captured on demand, it returns what is kept free instead of what was
    captured, which the worker's log lines compare, and does not collect garbage for captures that come later."""

    def capture(runner: Any, **options: bool) -> int:
        if not hasattr(runner, "cudagraph_manager") or not coverage.on_demand(runner.vllm_config):  # V1's has none
            if not options.get("profile_only"):
                coverage.say(runner.vllm_config)
            return int(stock(runner, **options))
        module = sys.modules["vllm.v1.worker.gpu.model_runner"]
        undo = replace(module, "freeze_gc_for_cudagraph_capture", lambda freeze: lambda: nullcontext())
        try:
            stock(runner, **options)
        finally:
            undo()
        session = getattr(runner.cudagraph_manager, "session", None)
        return 0 if session is None else session.budget.base + session.budget.limit

    return capture


@on_cuda
def plan_fingerprint(stock: Function) -> Function:
    """What ``VLLM_ENABLE_STARTUP_PLAN=1`` remembers is how large the KV cache is beside graphs of this kind."""

    def compute_plan_fingerprint(config: Any, *args: Any, **kwargs: Any) -> str:
        found: str = stock(config, *args, **kwargs)
        return f"{found}_on_demand" if coverage.on_demand(config) else found

    return compute_plan_fingerprint


@on_cuda
def notify_idle_state_callbacks(stock: Function) -> Function:
    """The engine core's loop calls it whenever it has no work, just before it waits for the next request
    (vllm/v1/engine/core.py, 0.32.0): graphs are captured until one comes."""

    def notify(core: Any) -> None:
        stock(core)
        capture_while_idle(core)

    return notify


def capture_while_idle(core: Any) -> None:
    """Capture one graph at a time, all or those that are likely to be asked for, until a request arrives or there is
    nothing to do.  Never raises: idle capture is then over."""
    patience = getattr(core, "_patience", 0.0)  # seconds; None: no more
    if patience is None:
        return
    try:
        policy = settings.of(core.vllm_config).VLLM_COMPILE_CUDAGRAPHS
        core._patience = None if policy == "eager" else PATIENCE
        if core.model_executor.is_sleeping:
            core.model_executor.collective_rpc(sleep_in_worker)
            return
        # A scheduler is paused while weights are updated: layers may be without any.
        while (
            policy != "eager"
            and core.is_running()
            and not core.is_scheduler_paused()
            and no_request(core.input_queue, patience)
            and any(core.model_executor.collective_rpc(use_gap_in_worker, args=(policy == "idle",)))
        ):
            patience = 0.0
    except Exception as error:
        core._patience = None
        logger.warning("CUDA graphs are not captured while idle any more (%s)", harmless.error(error))
        logger.debug("what stopped the capture while idle", exc_info=True)


def no_request(requests: Queue[Any], seconds: float) -> bool:
    """Whether none arrives for so long; returns as soon as one does, and leaves it there."""
    with requests.not_empty:
        return not requests.not_empty.wait_for(lambda: requests.queue, seconds)


def use_gap_in_worker(worker: Any, everything: bool) -> bool:
    """One capture in a worker; False when there is nothing to do now."""
    if getattr(worker, "_weight_update_active", False):
        return False
    return any(manager.use_gap(everything=everything) for manager in _managers(worker))


def sleep_in_worker(worker: Any) -> None:
    """Its weights may come back some time after it wakes: nothing is captured until a batch has run."""
    for manager in _managers(worker):
        manager.sleep()


def _managers(worker: Any) -> list[Any]:
    manager = getattr(getattr(worker, "model_runner", None), "cudagraph_manager", None)
    return [manager] if hasattr(manager, "use_gap") else []
