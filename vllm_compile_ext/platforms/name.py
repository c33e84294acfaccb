"""Where compiled code can run, in words: the system, and the processor or GPU that kernels are made for."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

# In this order Inductor prefers them (torch 2.13.0, `_inductor/cpu_vec_isa.py`); the name is that of Linux's flags.
_SETS = ("amx_tile", "avx512_bf16", "avx512f", "avx2", "asimd", "sve")


def name() -> str:
    """Such as "linux-x86_64 cpu avx512_bf16" or "linux-x86_64 cuda sm_90"."""
    return f"{_system()} {_gpu() or _cpu()}"


def possible() -> set[str] | None:
    """All that `name` may be in processes of this machine, found without torch; None where that takes torch."""
    found = {_cpu()}
    if Path("/dev/kfd").exists():  # an AMD GPU
        return None
    if Path("/dev/nvidiactl").exists():
        try:
            found |= _nvidia()
        except (OSError, AttributeError):
            return None
    return {f"{_system()} {one}" for one in found}


def _system() -> str:
    return f"{sys.platform}-{platform.machine()}"


def _cpu() -> str:
    return f"cpu {_instructions()}"


def _gpu() -> str | None:
    """Where CUDA is not running yet, vLLM is asked, which asks the driver's management library: torch would start it.
    vLLM then spawns its workers instead of forking them, and a process that only serves HTTP would take memory of the
    device."""
    torch = sys.modules.get("torch")  # a process without torch has no GPU to ask for
    if torch is None:
        return None
    if torch.cuda.is_initialized():
        if torch.version.hip:
            return f"hip {torch.cuda.get_device_properties(0).gcnArchName}"
        major, minor = torch.cuda.get_device_capability()
        return f"cuda sm_{major}{minor}"
    from vllm.platforms import current_platform

    if current_platform.is_rocm():
        from vllm.platforms import rocm

        return f"hip {rocm._GCN_ARCH}"
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return None if capability is None else f"cuda sm_{capability.major}{capability.minor}"


def _nvidia() -> set[str]:
    """What the driver's management library says.  Raises `OSError` or `AttributeError` when it does not."""
    library = ctypes.CDLL("libnvidia-ml.so.1")
    count, device, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    found = set()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        raise OSError("the driver cannot be asked")
    for index in range(count.value):
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            raise OSError("a GPU cannot be asked")
        if library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
            raise OSError("a GPU cannot be asked")
        found.add(f"cuda sm_{major.value}{minor.value}")
    library.nvmlShutdown()
    return found


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return next((one for one in _SETS if one in flags), "baseline")
