"""Samples of many shards under one running number, read by offset: no member before the wanted one is touched."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from data_tools.errors import DataError, UsageError
from data_tools.tar_index import ShardIndex, open_index
from data_tools.tar_scan import IMAGE_FIELDS

_MAX_OPEN_FILES = 64


class RawSample(NamedTuple):
    """One sample as it is stored: `key` is "shard.tar/key", `image` the encoded file, `label` the class index."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any] | None
    label: int | None


class _Found(NamedTuple):
    """Sample `local` of shard number `shard`; `places` maps its fields to (offset, size)."""

    shard: int
    local: int
    places: dict[str, tuple[int, int]]


class IndexedShards:
    """The samples of `paths`, numbered 0 .. len - 1 in the order of the shards and, within a shard, of the tar.

    Each process opens its own files when it first reads, at most 64 at a time, and reads with `pread`, so an object may
    be used after a fork, by several threads, and may be sent to data loader workers.

    Args:
        paths: the shards, as from `data_tools.expand.expand_shards`. An index that is missing or stale is made.
        verify: compare each member that is read with the SHA-256 in the index. Bit rot in JPEG and WebP decodes
            without an error in 19 of 20 cases; hashing costs about a millisecond a megabyte.
        require_caption: False gives "" where a sample has no `txt` (pictures that only have a label).

    Raises:
        UsageError: no paths.
        DataError: a shard is missing, damaged or without samples.
        CheckpointError: an index is damaged.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], verify: bool = False, require_caption: bool = True):
        if not paths:
            raise UsageError("no shards were given", mend="name a tar file, a folder of tars, or a pattern")
        self.paths = [Path(path) for path in paths]
        self.verify = verify
        self.require_caption = require_caption
        self._indexes: list[ShardIndex] = [open_index(path) for path in self.paths]
        self.shard_sizes: tuple[int, ...] = tuple(len(index) for index in self._indexes)
        self._stops = np.cumsum(self.shard_sizes)
        self._open_file = functools.lru_cache(_MAX_OPEN_FILES)(_open_shard)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_file = functools.lru_cache(_MAX_OPEN_FILES)(_open_shard)

    def key(self, i: SupportsIndex) -> str:
        """Return "shard.tar/key" of sample `i`; the shard's folder is not part of it."""
        shard, local = self._split(i)
        return f"{self.paths[shard].name}/{self._indexes[shard].key(local)}"

    def read(self, i: SupportsIndex) -> RawSample:
        """Return sample `i`.

        Raises:
            DataError: naming shard and key: no image, an empty caption, text that is not UTF-8 or holds NUL, bad
                metadata or label, a shard that changed since it was opened, or (`verify`) a wrong hash.
        """
        found = self._find(i)
        field = next((field for field in IMAGE_FIELDS if field in found.places), None)
        if field is None:
            raise self._error(found, "the sample has no image", f"its fields are: {' '.join(found.places)}")
        image = self._member(found, field)
        if not image:
            raise self._error(found, "the image is an empty file")
        return RawSample(self.key(i), image, self._caption(found), self._meta(found), self._label(found))

    def caption(self, i: SupportsIndex) -> str:
        """Return the caption of sample `i` without reading its image."""
        return self._caption(self._find(i))

    def meta(self, i: SupportsIndex) -> dict[str, Any] | None:
        """Return the JSON object of sample `i`, None where it has none, without reading its image."""
        return self._meta(self._find(i))

    def label(self, i: SupportsIndex) -> int | None:
        """Return the class index of sample `i`, None where it has none, without reading its image."""
        return self._label(self._find(i))

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the shards' names and contents, from the headers of their indexes.

        It does not change when shards are moved or copied, and does when a sample, its order or its bytes do.
        """
        parts = [
            [path.name, index.num_samples, index.tar_size, index.header["body_sha256"]]
            for path, index in zip(self.paths, self._indexes, strict=True)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _split(self, i: SupportsIndex) -> tuple[int, int]:
        number = operator.index(i)
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} samples, not a sample {number}")
        shard = int(np.searchsorted(self._stops, number, side="right"))
        return shard, number - int(self._stops[shard]) + self.shard_sizes[shard]

    def _find(self, i: SupportsIndex) -> _Found:
        shard, local = self._split(i)
        return _Found(shard, local, self._indexes[shard].locate(local))

    def _caption(self, found: _Found) -> str:
        caption = self._text(found, "txt").strip() if "txt" in found.places else ""
        if not caption and self.require_caption:
            raise self._error(found, "the caption is empty" if "txt" in found.places else "the sample has no caption")
        return caption

    def _meta(self, found: _Found) -> dict[str, Any] | None:
        if "json" not in found.places:
            return None
        try:
            meta = json.loads(self._text(found, "json"))
        except ValueError as error:
            raise self._error(found, f"the metadata is not JSON ({error})") from error
        if not isinstance(meta, dict):
            raise self._error(found, f"the metadata is a {type(meta).__name__} instead of an object")
        return meta

    def _label(self, found: _Found) -> int | None:
        if "cls" not in found.places:
            return None
        text = self._text(found, "cls").strip()
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise self._error(found, f"the label {text[:20]!r} is not a class index")
        return int(text)

    def _text(self, found: _Found, field: str) -> str:
        try:
            text = self._member(found, field).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._error(found, f".{field} is not UTF-8 (byte {error.start})") from error
        if "\0" in text:
            raise self._error(found, f".{field} holds a NUL character")
        return text

    def _member(self, found: _Found, field: str) -> bytes:
        index = self._indexes[found.shard]
        offset, size = found.places[field]
        file = self._open_file(self.paths[found.shard], index.tar_size)
        data = _read_exactly(file.fd, offset, size)
        if len(data) != size:
            raise self._error(found, f".{field} is cut: the shard has changed since it was opened")
        if self.verify and hashlib.sha256(data).digest() != index.digest(found.local, field):
            raise self._error(found, f".{field} is damaged: its hash is not the one in the index")
        return data

    def _error(self, found: _Found, what: str, meaning: str | None = None) -> DataError:
        where = f"{self.paths[found.shard]}, key {self._indexes[found.shard].key(found.local)!r}"
        return DataError(what, where=where, meaning=meaning, mend="mend or leave out the sample, make the shard again")


class _OpenFile:
    """A file descriptor that closes with its last user, so that eviction cannot close it under a reading thread."""

    def __init__(self, fd: int):
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def _open_shard(path: Path, tar_size: int) -> _OpenFile:
    try:
        file = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise DataError("the shard is gone since it was opened", where=str(path), mend="run again") from error
    size = os.fstat(file.fd).st_size
    if size != tar_size:
        what = f"the shard has changed since it was opened: {size} bytes instead of {tar_size}"
        raise DataError(what, where=str(path), mend="leave shards alone while they are read; run again")
    return file


def _read_exactly(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more  # one pread returns at most 2 GiB
    return data
