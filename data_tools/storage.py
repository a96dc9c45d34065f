"""Bytes of a file by offset, from the local disk or, for a URL, from a remote store by fsspec."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from data_tools.errors import DataError, UsageError

Place = Path | str  # a str is a URL

# What may be opened over the network. Others (pipe:, chains with ::) could run programs or unpack archives.
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")


class UnindexableError(DataError):
    """A remote shard that cannot be read by offset, only from its beginning to its end."""


@runtime_checkable
class ByteFile(Protocol):
    """A file that any number of threads may read by offset.

    `mtime_ns` is 0 where a store does not tell it; `piece` is how many bytes to read at once where all are wanted.
    """

    size: int
    mtime_ns: int
    piece: int

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file."""
        ...


class LocalFile:
    """A file of this machine, read with `pread`: no position is shared between threads or forked processes."""

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
        # Closed with its last user, so that no thread reads from a descriptor that another one closed.
        if hasattr(self, "_fd"):
            os.close(self._fd)


def is_url(spec: str) -> bool:
    """Return whether a text is a URL of a store that may be opened.

    Raises:
        UsageError: another scheme, `pipe:` among them.
    """
    match = _URL.match(spec)
    try:
        urlsplit(spec if match else "")
    except ValueError:  # whose text may hold a password
        raise UsageError("a URL is not valid", mend="check its host's name and brackets") from None
    if match is None and not spec.startswith("pipe:"):
        return False
    if match is None or match.group(1).lower() not in SCHEMES or "::" in spec:
        raise UsageError(
            "shards are read from local files and from " + ", ".join(SCHEMES),
            where=shown(spec),
            meaning="nothing was run or opened",
            mend="download the shards and give their folder",
        )
    return True


def open_file(place: Place) -> ByteFile:
    """Open a local path or a URL.

    Raises:
        DataError: it does not exist, or may not be read.
        UnindexableError: a web server has no byte ranges.
        ResourceError: a remote store does not answer.
    """
    if isinstance(place, str) and is_url(place):
        from data_tools.remote import open_remote

        return open_remote(place)
    path = Path(place)
    if not path.is_file():
        raise DataError("the shard does not exist", where=str(place), mend="check the path and the spelling")
    try:
        return LocalFile(path)
    except OSError as error:
        what = f"the shard cannot be read: {error.strerror}"
        raise DataError(what, where=str(place), mend="check who may read it") from error


def name_of(place: Place) -> str:
    """Return the last part of a path or URL, without a query."""
    return Path(urlsplit(place).path).name if isinstance(place, str) and is_url(place) else Path(place).name


def beside(url: str, suffix: str) -> str:
    """Return the URL of the file whose name has `suffix` added."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path + suffix))


def same_file(url: str) -> str:
    """Return what a URL and another one of the same file have in common.

    A query after a name in `.tar` is a signature, which changes; after another name it may tell which file it is.
    """
    return shown(url) if urlsplit(url).path.lower().endswith(".tar") else url


def shown(place: Place) -> str:
    """Return a path or URL for people: without the password and the query, which may hold a token."""
    text = str(place)
    if not _URL.match(text):
        return text
    parts = urlsplit(text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
