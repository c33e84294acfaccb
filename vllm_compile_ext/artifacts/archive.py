"""A tar archive in one zstd frame, written the same way every time and read without trust in what it says.

Only what `pack` writes can be read: plain files in the form of POSIX ustar, one behind the other.  Links, devices,
long-name records and whatever else tar knows are refused, so nothing here ever acts on them.  Memory stays below about
30 MB, however much a few compressed bytes expand to.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard

_LEVEL = 12
_WINDOW = 22  # log2 of the bytes that a reader has to keep
_BLOCK = 512  # bytes; tar pads headers and contents to it
_END = bytes(2 * _BLOCK)
_STEP = 256  # compressed bytes taken at a time: at most 64 zstd blocks of 128 KiB each
_PART = 1 << 20  # bytes handed out at a time

_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
}


class ArchiveError(ValueError):
    """Not an archive that `pack` wrote; the message continues a sentence that begins with its name."""


def pack(members: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The bytes of an archive of `members`, pairs of name and content.  Equal members give equal bytes."""
    parameters = zstandard.ZstdCompressionParameters.from_level(_LEVEL, window_log=_WINDOW, write_checksum=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    for name, data in members:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        yield frame.compress(header.tobuf(tarfile.USTAR_FORMAT))
        yield frame.compress(data)
        yield frame.compress(bytes(-len(data) % _BLOCK))
    yield frame.compress(_END)
    yield frame.flush()


class Reader:
    """Reads `file` from its beginning: `header` and `parts` for each member, then `end`.  All raise `ArchiveError`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW).decompressobj()
        self._ahead = bytearray()

    def header(self) -> tuple[str, int]:
        """Name and size in bytes of the next member."""
        block = self._read(_BLOCK)
        if block == bytes(_BLOCK):
            raise ArchiveError("ends before everything in its index has come")
        try:
            found = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise ArchiveError(f"is no tar archive ({error})") from error
        if found.type != tarfile.REGTYPE:
            raise ArchiveError(f"has a member {found.name!r} that is {_KINDS.get(found.type, 'no plain file')}")
        if found.size < 0:
            raise ArchiveError(f"has a member {found.name!r} of {found.size} bytes")
        return found.name, found.size

    def parts(self, size: int) -> Iterator[bytes]:
        """The `size` bytes of the member whose header was read last."""
        for start in range(0, size, _PART):
            yield self._read(min(_PART, size - start))
        if any(self._read(-size % _BLOCK)):
            raise ArchiveError("has bytes between its members")

    def end(self) -> None:
        """Make sure that nothing follows and that the file is whole."""
        if self._read(len(_END)) != _END:
            raise ArchiveError("has more members than its index")
        while not (self._frame.eof or self._ahead):
            self._decompress()
        if self._ahead or self._frame.unused_data or self._file.read(1):
            raise ArchiveError("has bytes behind its end")

    def _read(self, size: int) -> bytes:
        while len(self._ahead) < size:
            if self._frame.eof:
                raise ArchiveError("is truncated")
            self._decompress()
        data = bytes(self._ahead[:size])
        del self._ahead[:size]
        return data

    def _decompress(self) -> None:
        compressed = self._file.read(_STEP)
        if not compressed:
            raise ArchiveError("is truncated")
        try:
            self._ahead += self._frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise ArchiveError(f"is damaged, or no bundle ({error})") from error
