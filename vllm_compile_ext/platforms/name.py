"""Where compiled code can run, in words: the system, and the processor or GPU that kernels are made for."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

# In this order Inductor prefers them (torch 2.13.0, `_inductor/cpu_vec_isa.py`); the name is that of Linux's flags.
_SETS = ("amx_tile", "avx512_bf16", "avx512f", "avx2", "asimd", "sve")


def name() -> str:
    """Such as "linux-x86_64 cpu avx512_bf16" or "linux-x86_64 cuda sm_90"."""
    system = f"{sys.platform}-{platform.machine()}"
    gpu = _gpu()
    return f"{system} {gpu}" if gpu else f"{system} cpu {_instructions()}"


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # a process without torch has no GPU to ask for
    if torch is None or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return f"hip {torch.cuda.get_device_properties(0).gcnArchName}"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda sm_{major}{minor}"


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return next((one for one in _SETS if one in flags), "baseline")
