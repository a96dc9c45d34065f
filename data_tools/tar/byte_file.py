"""Files whose bytes are read by offset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from data_tools.core.errors import DataError


class UnindexableError(DataError):
    """A remote shard that cannot be read by offset, only from its beginning to its end."""


@runtime_checkable
class ByteFile(Protocol):
    """A file that several threads can read by offset.

    `mtime_ns` is 0 if a store does not provide it; `piece` is the number of bytes to read at once when reading it all.
    """

    size: int
    mtime_ns: int
    piece: int

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file."""
        ...


class LocalFile:
    """A local file, read with `pread`: no position is shared between threads or forked processes."""

    piece = 1 << 20

    def __init__(self, file: Path | int):
        """Open a path, or share an open descriptor."""
        self._fd = os.dup(file) if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self._fd)
        self.size = stat.st_size
        self.mtime_ns = stat.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file."""
        data = os.pread(self._fd, size, offset)
        while len(data) < size and (more := os.pread(self._fd, size - len(data), offset + len(data))):
            data += more  # one pread returns at most 2 GiB
        return data

    def __del__(self) -> None:
        # Closed with its last reference, so that no thread reads from a descriptor that another one closed.
        if hasattr(self, "_fd"):
            os.close(self._fd)
