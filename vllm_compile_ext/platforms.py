"""Where compiled code can run, in a few words, and what differs on CPU; neither torch nor vLLM is imported for it."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# In this order Inductor prefers them (torch 2.13.0, `_inductor/cpu_vec_isa.py`); the name is that of Linux's flags.
_SETS = ("amx_tile", "avx512_bf16", "avx512f", "avx2", "asimd", "sve")


def name() -> str:
    """The system, and what kernels are made for: "linux-x86_64 cpu avx512_bf16" or "linux-x86_64 cuda sm_90"."""
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
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"cpu {platform.processor() or 'unknown'}"
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = line[1].split() if line else ()
    return f"cpu {next((one for one in _SETS if one in flags), 'baseline')}"


def _gpu() -> str | None:
    """Where CUDA is not running yet, vLLM is asked, which asks the driver's management library.

    Torch would start CUDA: vLLM then spawns its workers instead of forking them, and a process that only serves HTTP
    takes memory of the device.
    """
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
    failed = library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        failed = failed or library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        failed = failed or library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
        found.add(f"cuda sm_{major.value}{minor.value}")
    library.nvmlShutdown()
    if failed:
        raise OSError("the driver cannot be asked")
    return found


def keep_mode(stock: Callable[[type, Any], None]) -> Callable[[type, Any], None]:
    """For `vllm.platforms.cpu.CpuPlatform.check_and_update_config`: keep the compilation mode that the user asked for.

    vLLM 0.32.0 turns `CompilationMode.VLLM_COMPILE` into `DYNAMO_TRACE_ONCE` there: the whole graph goes through
    Inductor as one piece and the result cannot be loaded again ("'function' object has no attribute
    'finalize_loading'"), so that every start compiles.  The piecewise path behind VLLM_COMPILE works on CPU too and
    loads.
    """

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        from vllm.config import CompilationMode
        from vllm.platforms import current_platform

        compilation = vllm_config.compilation_config
        asked = compilation.mode
        stock(cls, vllm_config)
        if not current_platform.is_cpu():  # a platform of another plugin's that builds on this one
            return
        if asked != CompilationMode.VLLM_COMPILE or compilation.mode == asked:
            return
        if reason := _why_stock_mode(vllm_config):
            logger.info("compilation mode stays %s, as in stock vLLM: %s", compilation.mode.name, reason)
            return
        compilation.mode = asked
        # Passes of vLLM's that match GPU kernels, and that CPU builds do not import.  vLLM 0.32.0 turns some on by
        # optimization level without a look at the platform, `fuse_rope_kvcache_cat_mla` for splitting_ops of the user's
        # own ("NameError: name 'MLARoPEKVCacheCatFusionPass' is not defined").
        passes = compilation.pass_config
        for field in dataclasses.fields(passes):
            if field.name.startswith("fuse_") or field.name == "enable_qk_norm_rope_fusion":
                setattr(passes, field.name, False)
        if compilation.compile_sizes is None:
            # Left None on platforms without static graphs; the piecewise backend then finds no range for any shape.
            compilation.compile_sizes = []

    return check_and_update_config


def _why_stock_mode(config: Any) -> str | None:
    """Why stock's mode is kept for a `VllmConfig` that asks for VLLM_COMPILE, or None when that mode can be served."""
    import vllm.envs

    if vllm.envs.VLLM_CPU_CI_ENV:
        return "VLLM_CPU_CI_ENV is set"
    if config.lora_config is not None:
        return "LoRA is not compiled on CPU"
    if config.compilation_config.use_inductor_graph_partition:
        return "use_inductor_graph_partition is not covered on CPU"
    return None
