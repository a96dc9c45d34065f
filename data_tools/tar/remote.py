"""Remote files: read by byte ranges, or downloaded completely if a web server does not support ranges.

Requests to web servers use the session of fsspec's HTTP file system. Its own read functions are not used: they treat
every failure as a missing file, and download the whole file for each sample if a server ignores ranges.

A sample costs one request (about 1 ms of a core, and a network round trip, which threads and loader workers hide).
Connections belong to a process: forked or spawned processes open their own.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from tempfile import TemporaryFile, gettempdir
from typing import IO, Any, NamedTuple, TypeVar

from data_tools.core.errors import DataError, MmvitError, ResourceError, UsageError
from data_tools.tar.byte_file import ByteFile, LocalFile, UnindexableError
from data_tools.tar.location import Location

_WAITS_S = (0.3, 1.0, 3.0)  # before the second, third and fourth attempt of a request
_PIECE = 8 << 20  # bytes per request when a whole file is read
_TIMED_BYTES = 4 << 20  # the timeout is extended once per this many bytes
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may be temporary
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")
_SECRET = re.compile(r"\S*(?:://|[?@])\S*")  # a URL or a part of one in an error message
# Errors with a message of their own, or bugs: a retry would fix neither.
_OURS = (MmvitError, ImportError, AttributeError, NameError, TypeError)

# What fsspec needs for a scheme; for http and https it is in the extra.
_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"}

T = TypeVar("T")


def open_remote(tar: Location) -> ByteFile:
    """Open the file at a URL.

    Raises:
        UnindexableError: the server does not support byte ranges, or does not report the size.
        DataError: the file does not exist, or cannot be read.
        ResourceError: the store does not respond.
    """
    try:
        return HttpFile(tar) if _is_http(tar) else StoreFile(tar)
    except ImportError as error:
        library = _LIBRARIES.get(tar.url.partition(":")[0].lower(), "mmvit[remote]")
        hint = f'pip install "{library}"'
        raise UsageError(f"a library is missing: {error}", where=tar, hint=hint) from error


def timeout_s() -> float:
    """Return how long a server may not respond, in s: MMVIT_REMOTE_TIMEOUT_S, default 30."""
    return float(os.environ.get("MMVIT_REMOTE_TIMEOUT_S") or 30)


class HttpFile:
    """A file on a web server. Its size is read from a range response: signed URLs often allow no other request."""

    piece = _PIECE

    def __init__(self, tar: Location):
        self.tar = tar
        part = _repeated(tar, lambda: self._ask(0, 1))
        self.size = part.total
        self.mtime_ns = part.mtime_ns
        self._version = part.version

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file; failed requests are retried.

        Raises:
            DataError: the file has changed since it was opened.
            ResourceError: the server does not respond.
        """
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        part = _repeated(self.tar, lambda: self._ask(offset, size))
        if (part.total, part.version) != (self.size, self._version):
            hint = "do not modify shards while they are read; run again"
            raise DataError("the shard was changed on the server while it was read", where=self.tar, hint=hint)
        return part.data

    def _ask(self, offset: int, size: int) -> _Part:
        return _run(_get_part, self.tar, offset, size, timeout=timeout_s() * (1 + size / _TIMED_BYTES))


class StoreFile:
    """A file on any other store that fsspec supports."""

    mtime_ns = 0
    piece = _PIECE

    def __init__(self, tar: Location):
        self.tar = tar
        size = _repeated(tar, lambda: self._call("info", timeout_s()))["size"]
        if size is None:
            hint = "download the shards"
            raise DataError("the store does not report the size of the shard", where=tar, hint=hint)
        self.size = int(size)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file; failed requests are retried."""
        size = min(size, self.size - offset)
        return _repeated(self.tar, lambda: self._part(offset, size)) if size > 0 else b""

    def _part(self, offset: int, size: int) -> bytes:
        limit = timeout_s() * (1 + size / _TIMED_BYTES)
        return _whole(bytes(self._call("cat_file", limit, start=offset, end=offset + size)), size)

    def _call(self, name: str, timeout: float, **options: Any) -> Any:
        from fsspec.asyn import sync
        from fsspec.core import url_to_fs

        store, path = url_to_fs(self.tar.url)  # fsspec keeps one store per process
        if store.async_impl:
            return sync(store.loop, getattr(store, f"_{name}"), path, timeout=timeout, **options)
        return getattr(store, name)(path, **options)


def fetch(tar: Location) -> tuple[LocalFile, str]:
    """Download a whole file from a web server to a temporary file; return it, and "" or why it is truncated.

    The file is unnamed and deleted when it is closed or the process is killed.

    Raises:
        DataError: the file does not exist, or cannot be read.
        ResourceError: the server does not respond, or the temporary folder is full.
    """
    try:
        with TemporaryFile() as out:
            broken = _copy(tar, out)
            out.flush()
            return LocalFile(out.fileno()), broken
    except OSError as error:
        hint = "set TMPDIR to a folder with space for three shards per loader worker"
        raise ResourceError(f"the shard cannot be stored: {error.strerror}", where=gettempdir(), hint=hint) from error


def _copy(tar: Location, out: IO[bytes]) -> str:
    broken = ""
    for _ in range(len(_WAITS_S) + 1):
        reply = _repeated(tar, lambda: _run(_get, tar, {}, timeout=timeout_s()))
        out.seek(0)
        out.truncate()
        piece, broken = _next_piece(reply)
        while piece:
            out.write(piece)
            piece, broken = _next_piece(reply)
        _web(os.getpid()).loop.call_soon_threadsafe(reply.close)
        if not broken:
            break
    return broken


def _next_piece(reply: Any) -> tuple[bytes, str]:
    """Return the bytes that came, none at the end; and why it is too early for the end."""
    try:
        return _run(reply.content.readany, timeout=timeout_s()), ""
    except _OURS:
        raise
    except Exception as error:
        return b"", _reason(error)


class _Part(NamedTuple):
    """Facts about a remote file, and a part of its bytes."""

    total: int
    version: str
    mtime_ns: int
    data: bytes


async def _get_part(tar: Location, offset: int, size: int) -> _Part:
    async with await _get(tar, {"Range": f"bytes={offset}-{offset + size - 1}"}) as reply:
        content_range = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
        if content_range is None or (reply.status, content_range[1]) not in ((206, str(offset)), (416, None)):
            # The server sends the whole file, which is not read.
            raise UnindexableError("the server does not support byte ranges", where=tar)
        total = int(content_range[2])
        etag, modified = reply.headers.get("ETag", ""), reply.headers.get("Last-Modified", "")
        wanted = max(0, min(size, total - offset))
        data = bytearray()
        while reply.status == 206 and len(data) < wanted and (piece := await reply.content.readany()):
            data += piece
        version = modified if etag.startswith("W/") or not etag else etag
        return _Part(total, version, _nanoseconds(modified), _whole(bytes(data[:wanted]), wanted))


async def _get(tar: Location, headers: dict[str, str]) -> Any:
    """Return the response to a request, without reading its body."""
    import yarl

    session = await _web(os.getpid()).set_session()
    url = tar.url
    address = yarl.URL(url, encoded=url.isascii() and " " not in url)  # a signature may depend on the exact characters
    reply = await session.get(address, headers={"Accept-Encoding": "identity", **headers})
    error: Exception | None = None
    if reply.status in _PASSING:
        error = OSError(f"HTTP status {reply.status}")
    elif reply.status in (404, 410):
        error = _does_not_exist(tar)
    elif reply.status >= 400 and reply.status != 416:
        error = _refused(tar, f" (HTTP status {reply.status})")
    elif reply.headers.get("Content-Encoding", "identity") != "identity":
        error = DataError("the server sends the shard compressed", where=tar, hint="download the shards")
    if error is not None:
        reply.close()
        raise error
    return reply


def _run(task: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    from fsspec.asyn import sync

    return sync(_web(os.getpid()).loop, task, *arguments, timeout=timeout)


@functools.cache
def _web(pid: int) -> Any:
    """Return the connections of this process; those inherited by a fork are kept, but not used."""
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    limits = aiohttp.ClientTimeout(total=None)  # each call has its own timeout
    options = {"timeout": limits, "trust_env": True, "auto_decompress": False}
    return HTTPFileSystem(skip_instance_cache=True, client_kwargs=options)


def _repeated(tar: Location, task: Callable[[], T]) -> T:
    """Return the result of `task`, with up to four attempts. Errors contain no text that may contain a token."""
    for wait in (*_WAITS_S, None):
        try:
            return task()
        except _OURS:
            raise
        except FileNotFoundError:
            raise _does_not_exist(tar) from None
        except PermissionError:
            raise _refused(tar) from None
        except ValueError as error:
            raise UsageError(f"the URL cannot be opened: {_reason(error)}", where=tar) from None
        except Exception as error:  # the libraries of stores raise their own errors
            if wait is None:
                raise ResourceError(
                    f"the remote store failed {len(_WAITS_S) + 1} times in a row: {_reason(error)}",
                    where=tar,
                    hint="check the network, then run again; MMVIT_REMOTE_TIMEOUT_S sets the timeout",
                ) from None
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no response for {timeout_s():g} s"
    return _SECRET.sub("...", f"{type(error).__name__}: {error}" if type(error) is not OSError else str(error))


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(f"received {len(data)} of {size} bytes")
    return data


def _nanoseconds(date: str) -> int:
    try:
        return int(parsedate_to_datetime(date).timestamp()) * 10**9
    except ValueError:
        return 0


def _is_http(tar: Location) -> bool:
    return tar.url.lower().startswith(("http://", "https://"))


def _does_not_exist(tar: Location) -> DataError:
    return DataError("the shard does not exist", where=tar, hint="check the URL")


def _refused(tar: Location, detail: str = "") -> DataError:
    hint = "check the URL and the credentials; signed URLs expire"
    return DataError(f"the server denies access to the shard{detail}", where=tar, hint=hint)
