r"""The sidecar index of a shard, `NAME.tar.idx`: for each sample the offset, size and SHA-256 of its members.

Layout of version 1 (little-endian), so that opening costs the same for every shard size:

    MMVIT-TAR-INDEX 1\n                  magic line
    {"body_offset": ..., ...}\n          one line of JSON, see `_HEADER_KEYS`; `header_sha256` covers the rest of it
    zero bytes up to body_offset         a multiple of 64
    body                                 arrays, each aligned to 8 bytes, placed by the header's `arrays`:
      keys           u1 [K]              the UTF-8 keys, one after the other
      key_offsets    u8 [n + 1]          key i is keys[key_offsets[i]:key_offsets[i + 1]]
      FIELD.offset   i8 [n]              where the member's bytes begin in the tar; -1 = the sample lacks the field
      FIELD.size     i8 [n]
      FIELD.sha256   u1 [n, 32]

Keys follow webdataset: the base name is split at its first dot, the folder is part of the key, members called `__x__`
are skipped and fields are lower-cased. `data_tools.tar_scan` reads the tar.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.atomic import write_atomic
from data_tools.errors import CheckpointError
from data_tools.tar_scan import ScannedTar, scan_tar

logger = logging.getLogger(__name__)

MAGIC = b"MMVIT-TAR-INDEX 1\n"
_ALIGN = 64
_MAX_HEADER_BYTES = 1 << 20
_HEADER_KEYS = {
    "arrays",  # name -> [offset in the body, numpy type, shape]
    "body_offset",
    "body_sha256",
    "body_size",
    "fields",  # sorted field names
    "ignored",  # suffix -> number of members that no sample uses
    "num_samples",
    "tar_mtime_ns",
    "tar_size",
    "header_sha256",
}


def index_path(tar: str | os.PathLike[str]) -> Path:
    """Return the path of the sidecar index of `tar`."""
    return Path(f"{os.fspath(tar)}.idx")


class ShardIndex:
    """The index of one shard; the header is read at once, the body is memory-mapped and checked on first use.

    Args:
        tar: path of the shard.
        data: the whole index, for an index that is not on disk; None reads `index_path(tar)`.

    Raises:
        CheckpointError: the index is damaged (at once for the header and the file size, on first use for the body).
    """

    def __init__(self, tar: str | os.PathLike[str], data: bytes | None = None):
        self.tar = Path(tar)
        self._data = data
        self._arrays: dict[str, np.ndarray[Any, Any]] | None = None
        if data is not None:
            self.header = _parse_header(data[: len(MAGIC) + _MAX_HEADER_BYTES], len(data), self.tar)
        else:
            with index_path(tar).open("rb") as file:
                head = file.readline(len(MAGIC)) + file.readline(_MAX_HEADER_BYTES)
                self.header = _parse_header(head, os.fstat(file.fileno()).st_size, self.tar)
        self.num_samples: int = self.header["num_samples"]
        self.fields: tuple[str, ...] = tuple(self.header["fields"])
        self.ignored: dict[str, int] = self.header["ignored"]
        self.tar_size: int = self.header["tar_size"]

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # a memory map is opened again by each process

    def key(self, i: int) -> str:
        """Return the key of sample `i`, without the shard's name."""
        arrays = self._body()
        start, stop = arrays["key_offsets"][self._checked(i) : i + 2].tolist()
        return arrays["keys"][start:stop].tobytes().decode()

    def keys(self) -> Iterator[str]:
        """Yield the keys of all samples in their order."""
        return (self.key(i) for i in range(self.num_samples))

    def locate(self, i: int) -> dict[str, tuple[int, int]]:
        """Return field -> (offset, size) in bytes, of the fields that sample `i` has."""
        arrays = self._body()
        self._checked(i)
        places = {field: (int(arrays[f"{field}.offset"][i]), int(arrays[f"{field}.size"][i])) for field in self.fields}
        return {field: place for field, place in places.items() if place[0] >= 0}

    def digest(self, i: int, field: str) -> bytes:
        """Return the SHA-256 (32 bytes) of one member as it was when the index was made."""
        return bytes(self._body()[f"{field}.sha256"][self._checked(i)])

    def is_fresh(self, stat: os.stat_result) -> bool:
        """Return whether the tar still has the size and time that it had when it was indexed."""
        return bool(stat.st_size == self.tar_size and stat.st_mtime_ns == self.header["tar_mtime_ns"])

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"{self.tar.name} has {self.num_samples} samples, not a sample {i}")
        return i

    def _body(self) -> dict[str, np.ndarray[Any, Any]]:
        if self._arrays is None:
            self._arrays = _map_body(self.header, self._data, self.tar)
        return self._arrays


def build_index(tar: str | os.PathLike[str]) -> ShardIndex:
    """Read the whole tar and write its index beside it.

    A folder that cannot be written gives an index in memory, with a logged notice.

    Raises:
        DataError: the tar is compressed, truncated, damaged, empty, or its members form no clean samples.
    """
    data = index_bytes(scan_tar(tar))
    try:
        write_atomic(index_path(tar), data)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        logger.warning("%s cannot be written (%s); the index is kept in memory", index_path(tar), error.strerror)
        return ShardIndex(tar, data)
    return ShardIndex(tar)


def open_index(tar: str | os.PathLike[str]) -> ShardIndex:
    """Open the index of `tar`; it is made on first use, and made again when the tar has changed.

    Raises:
        CheckpointError: the index is damaged. It is not replaced in silence, because its hashes are what shows
            damage of the tar.
        DataError: the tar is missing, or `build_index` refuses it.
    """
    if not index_path(tar).exists():
        return build_index(tar)
    index = ShardIndex(tar)
    if not Path(tar).exists():
        scan_tar(tar)  # raises: the shard is missing
    if index.is_fresh(Path(tar).stat()):
        return index
    old_body = index.header["body_sha256"]
    index = build_index(tar)
    same = "its samples are the same" if index.header["body_sha256"] == old_body else "its samples have changed"
    logger.warning("%s: size or time differs from the index, which was made again; %s", os.fspath(tar), same)
    return index


def index_bytes(scan: ScannedTar) -> bytes:
    """Return the content of the index file of a scanned tar."""
    keys = [key.encode() for key in scan.keys]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "keys": np.frombuffer(b"".join(keys), "u1"),
        "key_offsets": np.concatenate([[0], np.cumsum([len(key) for key in keys])]).astype("<u8"),
    }
    fields = sorted({field for sample in scan.samples for field in sample})
    for field in fields:
        members = [sample.get(field) for sample in scan.samples]
        arrays[f"{field}.offset"] = np.array([m.offset if m else -1 for m in members], "<i8")
        arrays[f"{field}.size"] = np.array([m.size if m else 0 for m in members], "<i8")
        digests = b"".join(m.sha256 if m else bytes(32) for m in members)
        arrays[f"{field}.sha256"] = np.frombuffer(digests, "u1").reshape(-1, 32)
    places: dict[str, tuple[int, str, list[int]]] = {}
    body = bytearray()
    for name, array in arrays.items():
        body += bytes(-len(body) % 8)
        places[name] = (len(body), array.dtype.str.lstrip("|"), list(array.shape))
        body += array.tobytes()
    header: dict[str, Any] = {
        "arrays": places,
        "body_sha256": hashlib.sha256(body).hexdigest(),
        "body_size": len(body),
        "fields": fields,
        "ignored": dict(sorted(scan.ignored.items())),
        "num_samples": len(keys),
        "tar_mtime_ns": scan.mtime_ns,
        "tar_size": scan.size,
    }
    head_size = len(MAGIC) + len(_dump_header({**header, "body_offset": 10**12}))
    header["body_offset"] = head_size + -head_size % _ALIGN
    head = MAGIC + _dump_header(header)
    return head + bytes(header["body_offset"] - len(head)) + bytes(body)


def _dump_header(header: Mapping[str, Any]) -> bytes:
    signed = {**header, "header_sha256": _header_sha256(header)}
    return json.dumps(signed, sort_keys=True).encode() + b"\n"


def _header_sha256(header: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in header.items() if name != "header_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _parse_header(head: bytes, file_size: int, tar: Path) -> dict[str, Any]:
    line, newline, _ = head[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line) if head.startswith(MAGIC) and newline else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or set(header) != _HEADER_KEYS:
        raise _damaged(tar, "its header cannot be read")
    if header["header_sha256"] != _header_sha256(header):
        raise _damaged(tar, "its header does not match its hash")
    if file_size != header["body_offset"] + header["body_size"]:
        raise _damaged(tar, f"it has {file_size} bytes instead of {header['body_offset'] + header['body_size']}")
    return header


def _map_body(header: dict[str, Any], data: bytes | None, tar: Path) -> dict[str, np.ndarray[Any, Any]]:
    buffer: bytes | mmap.mmap
    if data is not None:
        buffer = data
    else:
        with index_path(tar).open("rb") as file:
            if os.fstat(file.fileno()).st_size != header["body_offset"] + header["body_size"]:
                raise _damaged(tar, "it has changed since it was opened")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = header["body_offset"]
    body = memoryview(buffer)[start:]
    if hashlib.sha256(body).hexdigest() != header["body_sha256"]:
        raise _damaged(tar, "its body does not match its hash")
    return {
        name: np.frombuffer(buffer, dtype, int(np.prod(shape)), start + offset).reshape(shape)
        for name, (offset, dtype, shape) in header["arrays"].items()
    }


def _damaged(tar: Path, how: str) -> CheckpointError:
    path = index_path(tar)
    return CheckpointError(
        f"the shard index is damaged: {how}",
        where=str(path),
        meaning="nothing was read from the shard; the shard itself is not changed",
        mend=f"mmvit-data index --rebuild {tar}",
    )
