"""What was measured on: for a reader who compares two tables."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

from vllm_compile_ext import __version__, versions


def machine() -> str:
    """The machine and the versions, for a reader who compares two tables."""
    cores = len(os.sched_getaffinity(0))
    vllm = f"{versions.vllm_distribution()} {versions.vllm_version()}"
    return (
        f"{processor()}, {cores} cores; {platform.python_implementation()} {platform.python_version()}, "
        f"torch {metadata.version('torch')}, {vllm}, vllm-compile-ext {__version__}; {time.strftime('%Y-%m-%d')}"
    )


def processor() -> str:
    """The GPU's name by nvidia-smi, or the processor's by /proc/cpuinfo, else the machine type."""
    if smi := shutil.which("nvidia-smi"):
        asked = [smi, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return ", ".join(done.stdout.split("\n")).strip(", ")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
