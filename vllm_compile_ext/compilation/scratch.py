"""The folder that Inductor works in while this process compiles; nothing in it outlives the process.

Upstream keeps Inductor's files for all starts.  A compiler that was killed leaves half a kernel there, and the next
start maps it.  What is worth keeping is in the store; so each process gets a folder of its own.
"""

from __future__ import annotations

import atexit
import functools
import logging
import re
import tempfile
from pathlib import Path

from vllm_compile_ext import temporary

logger = logging.getLogger(__name__)

NAME = "compile_scratch"  # of the folder in vLLM's cache root
PREFIX = "vllm-compile-"
_PLAIN = re.compile(r"[\w./+@:,=-]+")


@functools.cache
def folder() -> Path:
    """This process's folder, made on the first call: below vLLM's cache root, or the system's temporary folder.

    The latter also where the root's name has spaces or the like: Inductor does not quote it for its compiler (torch
    2.13.0, `_inductor/cpp_builder.py`).  Folders of processes that are gone are removed.
    """
    import vllm.envs

    elsewhere = Path(tempfile.gettempdir())
    root = Path(vllm.envs.VLLM_CACHE_ROOT) / NAME
    if not _PLAIN.fullmatch(str(root)):
        root = elsewhere
    try:
        root.mkdir(parents=True, exist_ok=True)
        made = temporary.Folder(root, PREFIX)
    except OSError as error:
        made = temporary.Folder(elsewhere, PREFIX)
        logger.warning("compiling in %s: %s cannot be written (%s)", made.path, root, error.strerror)
    atexit.register(made.remove)
    return made.path


def inductor() -> Path:
    """Where Inductor keeps its files."""
    path = folder() / "inductor"
    path.mkdir(exist_ok=True)
    return path


def remove_abandoned(root: Path) -> None:
    """Remove the folders below `root` of processes that are gone."""
    temporary.remove_abandoned(root, PREFIX)
