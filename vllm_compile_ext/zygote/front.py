"""When the zygote is made: once vLLM's command has imported everything, and before it does anything else."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from vllm_compile_ext import finder, harmless, versions
from vllm_compile_ext.replace import replace
from vllm_compile_ext.zygote import NotForkedError, reads
from vllm_compile_ext.zygote.surroundings import traced
from vllm_compile_ext.zygote.zygote import Zygote

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_NOT_INITIALIZED = 3  # cuda.h: CUDA_ERROR_NOT_INITIALIZED
# jemalloc begins its thread again in a fork.  The other is NVML's: it comes with `vllm.platforms.cuda`, while the
# driver is not started, and forks use CUDA all the same (tried on an H200).
_HARMLESS = re.compile(r"jemalloc_bg_thd$|cuda[0-9a-f]{11}$")

instead: Callable[[], None] | None = None  # is called where vLLM's command has imported everything
_zygote: Zygote | None = None
_why = ""  # there is none; "" where none was wanted


def wait() -> None:
    """Make it when vLLM's command calls `cli_env_setup`, which it does after its imports and before its options."""
    for module in versions.MOVED["cli_env_setup"].values():
        finder.finder.after(module, _watch)


def _watch(module: ModuleType) -> None:
    def and_make(stock: Callable[[], None]) -> Callable[[], None]:
        def cli_env_setup() -> None:
            if instead is not None:
                instead()
            method = os.environ.get(METHOD)
            stock()
            if _is_vllm_serve():
                make(f"{METHOD}={method} is set" if method else None)

        return cli_env_setup

    if hasattr(module, "cli_env_setup"):
        replace(module, "cli_env_setup", and_make)


def _is_vllm_serve() -> bool:
    """Whether the program is vLLM's own: the file of another, which is run again in the fork, may not bear that."""
    name = str(getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", ""))
    if name.startswith("vllm.") and "api_server" in name:
        return True
    return (name.startswith("vllm.") or Path(sys.argv[0]).name == "vllm") and sys.argv[1:2] == ["serve"]


def make(reason: str | None = None, others: Sequence[int] = ()) -> None:
    """Make the zygote of this process, unless there is a `reason` not to.  `others`: files that it does not need.

    Raises nothing.
    """
    global _zygote, _why
    reads.stop()
    _zygote = None
    try:
        _why = reason or reason_to_spawn() or ""
        if not _why:
            reads.first()
            _zygote = Zygote([*others, *reads.given_files()], _make_below)
            _why = threads_left() or ""
    except Exception as error:
        _why = harmless.error(error)
    if _why and _zygote is not None:
        _zygote.close()
        _zygote = None


def _make_below(others: Sequence[int]) -> Callable[[], None]:
    make(others=others)
    return end


def threads_left() -> str | None:
    """Threads that are there after a fork; those of libraries that know of forks, such as OpenBLAS, end before it."""
    tasks = (each for each in Path("/proc/self/task").iterdir() if each.name != str(os.getpid()))
    names = [name for each in tasks if not _HARMLESS.match(name := (each / "comm").read_text().strip())]
    return f"threads of libraries are running ({', '.join(names)})" if names else None


def reason_to_spawn() -> str | None:
    """What in this process a fork would not survive."""
    if others := [each.name for each in threading.enumerate() if each is not threading.main_thread()]:
        return f"a thread is running ({others[0]})"
    if sys.gettrace() or sys.getprofile() or any(map(_monitoring, range(6))):
        return "a debugger, a profiler or a coverage tool is at work"
    if "microsoft" in platform.uname().release.lower():
        return "WSL's NVML does not work in a fork"
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return "Ray has been started"
    if traced() or any(name in os.environ for name in ("CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH")):
        return "a native debugger or profiler is at work"
    version = sys.modules["torch"].version if "torch" in sys.modules else None
    if getattr(version, "hip", None) or getattr(version, "xpu", None):
        return "only CPUs and CUDA have been tried"
    return "the CUDA driver has been started" if _cuda_started() else None


def _monitoring(tool: int) -> bool:
    """Whether `sys.monitoring` (Python 3.12) has a tool of this number."""
    monitoring = getattr(sys, "monitoring", None)
    return monitoring is not None and monitoring.get_tool(tool) is not None


def _cuda_started() -> bool:
    """The driver is asked: torch does not know of what others, or its own `is_available`, have started."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return bool(driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) != _NOT_INITIALIZED)


def zygote() -> Zygote:
    """This process's.  Raises `NotForkedError`."""
    if _zygote is None or _zygote.owner != os.getpid():
        raise NotForkedError(_why or "it was started by another process")
    return _zygote


def wanted() -> bool:
    """Whether one was made or tried for in this process."""
    return _zygote is not None or bool(_why)


def end() -> None:
    """End it, where there is one."""
    global _zygote
    reads.stop()
    if _zygote is not None:
        _zygote.close()
        _zygote = None
