"""What became of each model's code in this start, for the process that asked for the start.

``vllm-compile-ext warm`` names a file in `VARIABLE`; vLLM's processes inherit it, and each adds a line for each of its
models.  The file is JSON, one `Outcome` a line.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

import msgspec

logger = logging.getLogger(__name__)

# Not VLLM_*: vLLM warns of such names that it does not know.
VARIABLE = "_VLLM_COMPILE_EXT_OUTCOMES"

What = Literal["kept", "found", "failed", "refused"]


class Outcome(msgspec.Struct, frozen=True):
    """What became of one model's code on one rank, or why there was no start.

    what: "kept" (compiled, and in the store now), "found" (loaded from it), "failed" (compiled and not kept), "refused"
    (nothing was started).  key, shard, model: as in `vllm_compile_ext.store.manifest.Manifest`; "" for "refused".
    why: for people, of "failed" and "refused".
    """

    what: What
    key: str = ""
    shard: str = ""
    model: str = ""
    why: str = ""


def tell(outcome: Outcome) -> None:
    """Add a line, when somebody asked; a failure is not an error of this start."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    try:
        # One write to a file opened for appending: lines of two processes do not mix.
        file = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(file, msgspec.json.encode(outcome) + b"\n")
        finally:
            os.close(file)
    except OSError as error:
        logger.warning("%s cannot be written: %s", name, error)


def read(path: Path) -> list[Outcome]:
    """The lines of the file at `path`; what a process left half-written is no line."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [msgspec.json.decode(line, type=Outcome) for line in whole.splitlines()]
