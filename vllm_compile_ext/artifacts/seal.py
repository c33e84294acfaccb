"""A seal behind an artifact file: digests of its bytes and of the files it needs, checked before any of them is used.

A sealed file is the artifact's own bytes, then a JSON record, then the record's length and a magic number.  Readers
that do not know the seal (stock vLLM unpickles, and a pickle ends itself) see the artifact unchanged.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

_MAGIC = b"vcxseal1"
_TAIL = struct.Struct("<Q8s")  # length of the record in bytes, magic


class DamagedError(RuntimeError):
    """`path`, an artifact or a file that one needs, is not what was written; the message says how."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}")
        self.path = path


def digest(data: bytes) -> str:
    """blake3 of `data`, 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def seal(payload: bytes, root: Path, needed: Iterable[Path]) -> bytes:
    """The bytes of a sealed file for `payload`, which needs the files `needed`, each below `root`."""
    files = {str(path.relative_to(root)): digest(path.read_bytes()) for path in sorted(set(needed))}
    record = json.dumps({"payload": digest(payload), "files": files}).encode()
    return payload + record + _TAIL.pack(len(record), _MAGIC)


def read(path: Path, root: Path) -> tuple[bytes, list[DamagedError]]:
    """The payload of the sealed file `path`, and the needed files below `root` that are damaged or missing.

    Raises `DamagedError` when the file itself is damaged or has no seal, `OSError` when it cannot be read.
    """
    data = path.read_bytes()
    if len(data) < _TAIL.size:
        raise DamagedError(path, f"is truncated ({len(data)} bytes)")
    length, magic = _TAIL.unpack(data[-_TAIL.size :])
    end = len(data) - _TAIL.size - length
    if magic != _MAGIC or end < 0:
        raise DamagedError(path, "is truncated or was not written by this plugin: it has no seal")
    try:
        record = json.loads(data[end : -_TAIL.size])
        expected, files = record["payload"], dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(path, f"has a damaged seal ({error})") from error
    payload = data[:end]
    if digest(payload) != expected:
        raise DamagedError(path, "is corrupt: its digest does not match")
    return payload, [bad for name, want in files.items() if (bad := _check(root / name, want))]


def _check(path: Path, expected: str) -> DamagedError | None:
    try:
        found = digest(path.read_bytes())
    except OSError as error:
        return DamagedError(path, f"cannot be read ({error.strerror})")
    return None if found == expected else DamagedError(path, "is corrupt: its digest does not match")
