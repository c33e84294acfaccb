"""The file of one start, to which all its processes append one JSON object a line.

A line is one `os.write` to a file opened for appending: lines of two processes do not mix, and what a killed process
wrote is there.  Whatever goes wrong costs one warning, of all processes together, and the record; nothing raises.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

KEPT = 20
MAX_BYTES = 8 * 2**20  # that one process writes: a start takes some ten thousands


def encode(line: Mapping[str, Any]) -> bytes:
    """One line; what JSON does not know becomes its text."""
    return json.dumps(line, separators=(",", ":"), default=str, ensure_ascii=False).encode(errors="replace") + b"\n"


class StartFile:
    """A start's file, open for appending."""

    def __init__(self, path: Path, *, new: bool) -> None:
        flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0)
        self.path = path
        self._written = 0
        self._file = open(path, "ab", buffering=0, opener=lambda name, _: os.open(name, flags, 0o600))  # noqa: SIM115

    @classmethod
    def create(cls, trace: str) -> StartFile | None:
        """Make a file and remove the oldest beyond `KEPT`; None, after a warning, where that fails."""
        from vllm_compile_ext.record import read  # takes milliseconds, and only the front end gets here

        folder = read.folder()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            path = folder / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{trace[:6]}{read.SUFFIX}"
            for old in read.recorded(folder)[: 1 - KEPT]:
                old.unlink(missing_ok=True)
            return cls(path, new=True)
        except OSError as error:
            _warn(folder, error)
            return None

    @classmethod
    def join(cls, path: Path) -> StartFile | None:
        """Open the file that another process of this start has made; None where it is gone."""
        try:
            return cls(path, new=False)
        except OSError as error:
            logger.debug("this process is not recorded: %s", error)
            return None

    def write(self, data: bytes) -> None:
        """Append whole lines; after a failure, or when there are far too many, nothing more is written."""
        if self._file.closed:
            return
        try:
            if self._file.write(data) != len(data):
                raise OSError(28, "No space left on device", str(self.path))
        except OSError as error:
            # The first process that fails marks the file, and the others keep quiet.
            warned = False
            with suppress(OSError):
                warned = not os.fstat(self._file.fileno()).st_mode & stat.S_IWUSR
                os.fchmod(self._file.fileno(), stat.S_IRUSR)
            if not warned:
                _warn(self.path, error)
            self.close()
        self._written += len(data)
        if self._written > MAX_BYTES:
            self.close()

    def close(self) -> None:
        """Write nothing more."""
        with suppress(OSError):
            self._file.close()


def _warn(where: Path, error: OSError) -> None:
    logger.warning("this start is not recorded: %s (%s); VLLM_COMPILE_STARTS=0 turns the record off", error, where)
