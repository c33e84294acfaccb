"""``vllm-compile-ext standby``: a process that has vLLM imported, of which `vllm serve` becomes a fork."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_compile_ext import standby
from vllm_compile_ext.cli.shared import UserError
from vllm_compile_ext.early import off


def command(
    idle: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="End when nobody has come for so long.")
    ] = None,
) -> None:
    """Hold a process that has vLLM imported: `vllm serve` of this user and environment then begins as a fork of it.

    Runs until it is ended; servers that it has made go on.  A start for which anything differs that an import could
    have read is an ordinary one, after a line that says what.
    """
    if off("VLLM_COMPILE_EXT") or off("VLLM_COMPILE_FORK"):
        raise UserError("VLLM_COMPILE_EXT, VLLM_COMPILE_FORK or VLLM_PLUGINS says that nothing is to be forked")
    program = Path(next(iter(standby.__path__)), "__main__.py")
    os.execv(sys.executable, [sys.executable, str(program), *([str(idle)] if idle else [])])
