"""What is true of a process when it first imports vLLM, beside its environment and its files.

Standby and client look at the same moment: what was imported before is the same, and so are Python's options.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from vllm_compile_ext.zygote.surroundings import fixed, limits, traced

_GIVEN = "the process group or session"  # to a server: one of its own, which the client's signals reach


def differs(process: int) -> str | None:
    """What the system says of another process and not of this one."""
    here, there = fixed(), fixed(process)
    return next((what for what in here if what != _GIVEN and here[what] != there[what]), None)


def look() -> dict[str, Any]:
    """By what it is called in a sentence that says what differs."""
    skip = 0 if sys.flags.safe_path else 1  # the program's own folder: `standby.files.Files.hidden_by`
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return {
        "Python": (sys.version, sys.prefix, sys.base_prefix),
        "an option of Python": (tuple(sys.flags), sys.warnoptions, sorted(sys._xoptions.items()), sys.pycache_prefix),
        "Python's executable": sys.executable,
        "the search path of modules": sys.path[skip:],
        "what finds modules": [type(each).__name__ for each in sys.meta_path] + [repr(type(e)) for e in sys.path_hooks],
        "what is imported before vLLM": _imported(),
        "a resource limit": limits(),
        "the processors that it may use": sorted(os.sched_getaffinity(0)),
        "whether a standard stream is a terminal": [os.isatty(number) for number in (0, 1, 2)],
        "the encoding of a standard stream": [each and (each.encoding, each.errors) for each in streams],
        "the memory policy": _memory_policy(),
        "a debugger, a profiler or a thread": (sys.gettrace(), sys.getprofile(), threading.active_count(), traced()),
    }


def _memory_policy() -> str:
    """Of NUMA, as numactl sets it: "default", "bind:0" (man 7 numa); "" where the system has none."""
    try:
        with Path("/proc/self/numa_maps").open() as file:
            return file.readline().split()[1]
    except (OSError, IndexError):
        return ""


def _imported() -> dict[str, str]:
    """Modules that are not Python's own, nor what the two do here."""
    return {
        name: str(getattr(module, "__file__", None))
        for name, module in sys.modules.items()
        if name.partition(".")[0] not in (*sys.stdlib_module_names, "__main__", "__mp_main__", "vllm_compile_ext")
    }
