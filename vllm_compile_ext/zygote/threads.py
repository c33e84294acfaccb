"""OpenMP threads of a fork as those of a spawned process: how many, and each on its processor.

A spawned process's OpenMP reads its variables when it is loaded; a fork's has been loaded.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

KNOWN = ("LD_PRELOAD", "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY")


def problem(seen: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Which variable of `KNOWN` was changed so that a process that has loaded its libraries cannot follow."""
    before, after = ({*environ.get("LD_PRELOAD", "").replace(":", " ").split()} for environ in (seen, now))
    # One that only has to be there before others load their own; an allocator would have to be there from the start.
    late = [
        library for library in after - before if not (Path(library).name.startswith("libgomp") and _mapped(library))
    ]
    if late or before - after:
        return f"LD_PRELOAD was changed ({', '.join(Path(each).name for each in late or before - after)})"
    threads, processors = (now.get(name, "") for name in KNOWN[1:])
    if seen.get(KNOWN[2]) != now.get(KNOWN[2]) and (
        KNOWN[2] in seen or not re.fullmatch(r"\d+( \d+)*", processors) or threads != str(len(processors.split()))
    ):
        return f"GOMP_CPU_AFFINITY was set to {processors!r}"
    if seen.get(KNOWN[1]) != now.get(KNOWN[1]) and not re.fullmatch(r"[1-9]\d*", threads):
        return f"OMP_NUM_THREADS was set to {threads!r}"
    return None


def _mapped(library: str) -> bool:
    return f" {os.path.realpath(library)}\n" in Path("/proc/self/maps").read_text()


def follow(seen: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Have as many threads as `now` says, each on its processor, where `seen` said otherwise."""
    if all(seen.get(name) == now.get(name) for name in KNOWN[1:]):
        return
    import torch

    pinned = seen.get("GOMP_CPU_AFFINITY") != now.get("GOMP_CPU_AFFINITY")
    processors = [int(number) for number in now["GOMP_CPU_AFFINITY"].split()] if pinned else []
    if pinned:
        os.sched_setaffinity(0, processors[:1])  # other threads, which begin later, get it from this one
    if seen.get("OMP_NUM_THREADS") != now.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(now["OMP_NUM_THREADS"]))
        if not {"OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS"} & now.keys():
            _set_openblas(int(now["OMP_NUM_THREADS"]))
    if pinned:
        before = _threads()
        torch.zeros(1 << 20).add_(1)  # large enough for OpenMP's threads to begin
        for thread, processor in zip(sorted(_threads() - before), processors[1:], strict=False):
            os.sched_setaffinity(thread, {processor})


def _set_openblas(threads: int) -> None:
    """NumPy and OpenCV each bring an OpenBLAS, which asks for `OMP_NUM_THREADS` when it is loaded."""
    maps = Path("/proc/self/maps").read_text()
    for path in {*re.findall(r" (/\S*openblas\S*)$", maps, re.MULTILINE)}:
        library = ctypes.CDLL(path)
        for name in ("openblas_set_num_threads", "scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
            if (function := getattr(library, name, None)) is not None:
                function(threads)


def _threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}
