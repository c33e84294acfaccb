"""Bytecode of modules that have none is kept in vLLM's cache root: by choice, VLLM_COMPILE_PYCACHE=1.

A `.pyc` file beside a module is used as ever.  Where there is none and none may be written, as in an image with
read-only packages or with PYTHONDONTWRITEBYTECODE, Python would compile the module in each process: it does so once.

Standard library only, and little of it until it is chosen: this is imported before anything else is.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # of `typing`, which takes milliseconds to import
if TYPE_CHECKING:
    from typing import Any

importing: Any = sys.modules["importlib._bootstrap_external"]  # what imports run by


def keep() -> None:
    """From here on.  Python itself checks what it reads against the source, and writes a file whole or not at all."""
    from vllm_compile_ext import settings  # milliseconds, where this saves seconds

    folder = str(settings.cache_root() / "compile_pycache")
    os.makedirs(folder, mode=0o700, exist_ok=True)  # noqa: PTH103
    status = os.stat(folder)  # noqa: PTH116
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        return  # whoever can write there could have anything run
    stock, may_write = importing.cache_from_source, not sys.dont_write_bytecode

    def cache_from_source(path: str, *args: Any, **options: Any) -> str:
        beside: str = stock(path, *args, **options)
        there, _, _ = beside.rpartition("/")
        if not importing._path_isdir(there):
            there, _, _ = path.rpartition("/")
        if importing._path_isfile(beside) or (may_write and os.access(there, os.W_OK)):
            return beside
        return folder + os.path.abspath(beside)  # noqa: PTH100

    importing.cache_from_source = cache_from_source
    sys.dont_write_bytecode = False  # beside a module nothing is written that would not have been
