"""One private temporary folder for the processes of one vLLM: what they tell each other while it runs.

The front end, which is the first process that loads the plugin, makes it and names it in the environment that the
engine and the workers inherit.  It is gone when the front end ends; when that was killed, the next one removes it.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from vllm_compile_ext import temporary

logger = logging.getLogger(__name__)

# Not VLLM_*: vLLM warns of such names that it does not know.
VARIABLE = "_VLLM_COMPILE_EXT_RUN"
PREFIX = "vllm-compile-ext-run-"

_made: temporary.Folder | None = None


def folder() -> Path | None:
    """The folder of this vLLM; None where there is none, as where the plugin is off.  It may be gone by now."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def is_owner() -> bool:
    """Whether this process made the folder: it is the front end, or there is only one process."""
    return _made is not None and os.environ.get(VARIABLE) == str(_made.path) and _made.is_mine()


def make() -> Callable[[], None]:
    """Make the folder, unless this process was started by one that did; returns the undo.  A failure costs a line."""
    global _made
    before = os.environ.get(VARIABLE)
    if _is_child() and before and Path(before).is_dir():
        return lambda: None
    try:
        root = Path(tempfile.gettempdir())
        temporary.remove_abandoned(root, PREFIX)
        made = _made = temporary.Folder(root, PREFIX)
    except OSError as error:
        logger.warning("no metrics and no progress of this start: no temporary folder (%s)", error)
        os.environ.pop(VARIABLE, None)
        return lambda: None
    os.environ[VARIABLE] = str(made.path)
    atexit.register(made.remove)

    def undo() -> None:
        global _made
        made.remove()
        atexit.unregister(made.remove)
        _made = None
        if os.environ.get(VARIABLE) == str(made.path):
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before

    return undo


def _is_child() -> bool:
    """Whether Python's `multiprocessing` started this process, as vLLM starts the engine, the workers and more API
    servers.  A program that another vLLM runs, such as a second server, inherits the variable and is no part of it.
    """
    module = sys.modules.get("multiprocessing.process")
    return module is not None and module.parent_process() is not None
