"""Where the standby of a user and a Python environment is asked.

Standard library only, and little of it: this is imported before anything else is.
"""

from __future__ import annotations

import os
import stat
import sys
from zlib import crc32

VARIABLE = "VLLM_COMPILE_STANDBY"
LONGEST = 107  # bytes of a socket's path (man 7 unix)


def folder() -> str:
    return os.environ.get(VARIABLE) or f"/tmp/vllm-compile-ext-{os.getuid()}"


def socket() -> str:
    """Path of the socket; one for each `sys.prefix`."""
    return f"{folder()}/{crc32(os.fsencode(sys.prefix)):08x}.sock"


def is_private() -> bool:
    """Whether the folder is there, and nobody but this user can put anything in it."""
    try:
        status = os.lstat(folder())
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def program(arguments: list[str]) -> list[str] | None:
    """The arguments of `vllm serve` in those of a Python process, from its script or ``-m`` on; None for another."""
    words = arguments[1:]
    if words[:1] == ["-m"]:
        module = words[1] if len(words) > 1 else ""
        serves = module == "vllm.entrypoints.openai.api_server" or (
            module == "vllm.entrypoints.cli.main" and words[2:3] == ["serve"]
        )
    else:
        serves = os.path.basename(words[0] if words else "") == "vllm" and words[1:2] == ["serve"]  # noqa: PTH119
    return words if serves else None
