"""The folder that Inductor works in while this process compiles; nothing in it outlives the process.

Upstream keeps Inductor's files for all starts.  A compiler that was killed leaves half a kernel there, and the next
start maps it.  What is worth keeping is in the store; so each process gets a folder of its own.
"""

from __future__ import annotations

import atexit
import logging
import re
import tempfile
from pathlib import Path

from vllm_compile_ext import temporary

logger = logging.getLogger(__name__)

NAME = "compile_scratch"  # of the folder in vLLM's cache root
PREFIX = "vllm-compile-"
_PLAIN = re.compile(r"[\w./+@:,=-]+")

_folder: temporary.Folder | None = None


def folder() -> Path:
    """This process's folder, made on the first call: below vLLM's cache root, or the system's temporary folder.

    The latter also where the root's name has spaces or the like: Inductor does not quote it for its compiler (torch
    2.13.0, `_inductor/cpp_builder.py`).  Folders of processes that are gone are removed.
    """
    global _folder
    if _folder is None:
        import vllm.envs

        root = Path(vllm.envs.VLLM_CACHE_ROOT) / NAME
        if not _PLAIN.fullmatch(str(root)):
            root = Path(tempfile.gettempdir())
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_abandoned(root)
            _folder = temporary.Folder(root, PREFIX)
        except OSError as error:
            _folder = temporary.Folder(Path(tempfile.gettempdir()), PREFIX)
            logger.warning("compiling in %s: %s cannot be written (%s)", _folder.path, root, error.strerror)
        atexit.register(forget)
    return _folder.path


def inductor() -> Path:
    """Where Inductor keeps its files."""
    path = folder() / "inductor"
    path.mkdir(exist_ok=True)
    return path


def forget() -> None:
    """Remove the folder."""
    global _folder
    if _folder is not None:
        _folder.remove()
    _folder = None


def remove_abandoned(root: Path) -> None:
    """Remove the folders below `root` of processes that are gone."""
    temporary.remove_abandoned(root, PREFIX)
