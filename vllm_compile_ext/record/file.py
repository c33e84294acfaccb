"""The file of one start: where it is, that only the last few are kept, and how lines get into it.

All processes of a start append to the same file.  A line is one `os.write` to a file opened for appending: lines of two
processes do not mix, and what a killed process wrote is there.  Whatever goes wrong costs one warning, of all processes
together, and the record; nothing raises.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

KEPT = 20
MAX_BYTES = 8 * 2**20  # that one process writes: a start takes some ten thousands


def encode(line: Mapping[str, Any]) -> bytes:
    """One line; what JSON does not know becomes its text."""
    return json.dumps(line, separators=(",", ":"), default=str).encode(errors="replace") + b"\n"


class Log:
    """A start's file, open for appending."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.written = 0
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, trace: str, folder: Path | None = None) -> Log | None:
        """A new file; the oldest go, so that there are `KEPT` with it.  None, after a warning, where it cannot be."""
        from vllm_compile_ext.record import read  # takes milliseconds, and only the front end gets here

        where = read.folder() if folder is None else folder
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            where.mkdir(mode=0o700, exist_ok=True)
            path = where / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{trace[:6]}{read.SUFFIX}"
            for old in read.recorded(where)[: 1 - KEPT]:
                old.unlink(missing_ok=True)
            return cls(path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            _warn(where, error)
            return None

    @classmethod
    def join(cls, path: Path) -> Log | None:
        """The file that another process of this start has made; None where it is gone."""
        try:
            return cls(path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
        except OSError as error:
            logger.debug("this process is not recorded: %s", error)
            return None

    def write(self, lines: Iterable[bytes]) -> None:
        """Append `lines`; after a failure, or when there are far too many, nothing more is written."""
        data = b"".join(lines)
        if self._descriptor is None or not data:
            return
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(28, "No space left on device", str(self.path))
        except OSError as error:
            self._fail(error)
            return
        self.written += len(data)
        if self.written > MAX_BYTES:
            self.close()

    def _fail(self, error: OSError) -> None:
        """Stop; the first process that fails marks the file, and the others keep quiet."""
        descriptor = self._descriptor
        assert descriptor is not None
        told = False
        with suppress(OSError):
            told = not os.fstat(descriptor).st_mode & stat.S_IWUSR
            os.fchmod(descriptor, stat.S_IRUSR)
        if not told:
            _warn(self.path, error)
        self.close()

    def close(self) -> None:
        """Write nothing more."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


def _warn(where: Path, error: OSError) -> None:
    logger.warning("this start is not recorded: %s (%s); VLLM_COMPILE_STARTS=0 turns the record off", error, where)
