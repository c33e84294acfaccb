"""Compilers that run beside Python: g++ and the probe for the CPU's instruction set in threads, Triton in processes.

vLLM pins Inductor to one compile thread (`TORCHINDUCTOR_COMPILE_THREADS=1`, `vllm/env_override.py`): its workers may be
daemonic and must not fork.  Threads that wait for g++ fork nothing of ours (`subprocess` starts a program), and
Inductor's own pool of Triton compilers is started the same way when its start method is "subprocess".

Memory stays bounded: at most `wanted()` compilers run at a time, each on one kernel, pieces are lowered one by one, and
the processes end with the compilation.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

from vllm_compile_ext import harmless, settings

logger = logging.getLogger(__name__)

_preparing: threading.Thread | None = None


def wanted(vllm_config: Any) -> int:
    """How many kernels may compile at a time: `VLLM_COMPILE_WORKERS`, or the cores that this process may use."""
    return settings.of(vllm_config).VLLM_COMPILE_WORKERS or len(os.sched_getaffinity(0))


def prepare(vllm_config: Any, is_cold: Callable[[], bool]) -> None:
    """Start what compiling or loading will need, in the background and once: called when a model is constructed.

    On CPU that is the probe for the instruction set; on GPUs, where `is_cold()` says that there is nothing to load, the
    processes that compile Triton kernels: they import torch while the weights load.
    """
    from vllm.platforms import current_platform

    global _preparing
    if _preparing is not None:
        return

    def work() -> None:
        try:
            if current_platform.is_cpu():
                from torch._inductor import cpu_vec_isa

                cpu_vec_isa.valid_vec_isa_list()  # `choose_one_instruction_set`
            elif (count := wanted(vllm_config)) > 1 and is_cold():
                _start_processes(count)
        except Exception as error:  # a slower start is all that it costs
            logger.debug("compilers are not prepared: %s", harmless.error(error))

    # Inductor's settings live in context variables: the thread sees what this one does.
    context = contextvars.copy_context()
    _preparing = threading.Thread(target=context.run, args=(work,), daemon=True, name="prepare-compilers")
    _preparing.start()


def wait() -> None:
    """Wait for what `prepare` started."""
    if _preparing is not None:
        _preparing.join()


def _start_processes(count: int) -> None:
    """Start Inductor's pool of Triton compilers: a helper process that is spawned, and that forks its own workers."""
    import torch._inductor.config as inductor
    from torch._inductor.async_compile import AsyncCompile

    inductor.worker_start_method = "subprocess"
    inductor.compile_threads = count
    AsyncCompile.warm_pool()
    AsyncCompile.wakeup()


def stop() -> None:
    """End the pool, and let Inductor compile in this process again, as vLLM has it."""
    import torch._inductor.config as inductor
    from torch._inductor.async_compile import shutdown_compile_workers

    if inductor.compile_threads != 1:
        shutdown_compile_workers()
        inductor.compile_threads = 1


def choose_one_instruction_set(stock: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    """For `torch._inductor.cpu_vec_isa.valid_vec_isa_list`: on CPU only the best instruction set that works.

    Stock's compiles, and loads in a child process, a probe for each of up to five sets and their combinations (torch
    2.13.0): 7 s of a cold start and 1 s of a warm one, measured on an AMX machine.  Inductor picks the first.
    """

    def valid_vec_isa_list() -> list[Any]:
        from torch._inductor import config

        return best() if config.cpp.simdlen is None else stock()  # the user's choice may be another one

    @functools.cache
    def best() -> list[Any]:
        from torch._inductor import cpu_vec_isa
        from vllm.platforms import current_platform

        known = platform.machine() == "x86_64" and sys.platform == "linux" and current_platform.is_cpu()
        if not known or os.environ.get("ATEN_CPU_CAPABILITY"):
            return stock()
        flags = cpu_vec_isa.x86_isa_checker()
        named = [isa for isa in cpu_vec_isa.supported_vec_isa_list if all(f in flags for f in str(isa).split())]
        return next(([isa] for isa in named if isa), None) or stock()

    return valid_vec_isa_list


class Kernels:
    """C++ kernels that compile in a thread pool while Inductor lowers the next piece.

    A kernel is a stand-in until `wait` puts the real one into the generated modules.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._made: list[tuple[dict[str, Any], _StandIn]] = []

    def start(self, argtypes: list[str], source: str, module: dict[str, Any]) -> _StandIn:
        """Start compiling the kernel `source`, which the module that Inductor generated keeps among its globals."""
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        load = CppPythonBindingsCodeCache.load_pybinding_async
        kernel = _StandIn(load(argtypes, source, submit_fn=self._pool.submit))
        self._made.append((module, kernel))
        return kernel

    def wait(self) -> None:
        """Raise what the compiler says about the first kernel that does not compile; else all are real afterwards."""
        for module, kernel in self._made:
            real = kernel.result()
            module.update({name: real for name, value in module.items() if value is kernel})
        self._made.clear()


class _StandIn:
    def __init__(self, result: Callable[[], Any]) -> None:
        self.result = result

    def __call__(self, *args: Any) -> Any:
        return self.result()(*args)


@contextlib.contextmanager
def compiling(count: int) -> Iterator[Kernels]:
    """Compile C++ kernels with `count` workers inside; what is changed of Inductor for that is restored."""
    from torch._inductor.async_compile import AsyncCompile

    wait()
    pool = ThreadPoolExecutor(count, thread_name_prefix="compile")
    kernels = Kernels(pool)

    def cpp_pybinding(_: AsyncCompile, argtypes: list[str], source: str) -> _StandIn:
        return kernels.start(argtypes, source, sys._getframe(1).f_globals)

    try:
        with patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding):
            yield kernels
    finally:
        pool.shutdown(cancel_futures=True)
