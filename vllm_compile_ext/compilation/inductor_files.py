"""The files of Inductor's cache that this process runs."""

from __future__ import annotations

import sys
from pathlib import Path


def loaded(folder: Path) -> list[Path]:
    """Files below `folder` that this process has loaded: Python wrappers, and shared objects where the system says so.

    Whatever else lies there (probes for instruction sets, other ranks' work, perhaps half-written) is not ours to vouch
    for.
    """
    root = folder.resolve()
    names = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
    codecache = sys.modules.get("torch._inductor.codecache")
    if codecache is not None:
        names |= {str(module.__file__) for module in codecache.PyCodeCache.modules}
    maps = Path("/proc/self/maps")
    if maps.exists():
        names |= {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.endswith(".so")}
    paths = {Path(name).resolve() for name in names if root.name in name}
    return sorted(folder / path.relative_to(root) for path in paths if path.is_relative_to(root) and path.is_file())
