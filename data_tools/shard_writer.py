"""Writes samples into shards that appear whole, with their index, and are equal byte for byte for equal samples."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from data_tools.atomic import rename_synced, temporary_name, write_atomic
from data_tools.errors import DataError, UsageError, did_you_mean
from data_tools.tar_index import index_bytes, index_path
from data_tools.tar_scan import FIELDS, IMAGE_FIELDS, scan_tar

_KEY = re.compile(r"^(?!/)(?!__[^/]*__($|/))(?:[^/\0\n]+/)*[^./\0\n]+$")


class ShardWriter:
    """Writes `PREFIX-00000.tar`, `PREFIX-00001.tar`, ... and the index of each; use it in a `with` block.

    A shard is built under a temporary name, synced, indexed and renamed. When the block ends with an exception, the
    shard that was being written is removed and the finished ones stay.

    Args:
        folder: made when it does not exist.
        prefix: of the shards' names.
        max_samples: samples a shard, at least 1.

    Raises:
        UsageError: bad arguments, or the folder already holds shards of this prefix.
    """

    def __init__(self, folder: str | os.PathLike[str], prefix: str = "shard", max_samples: int = 1000):
        if max_samples < 1:
            raise UsageError(f"a shard needs at least 1 sample, got max_samples={max_samples}")
        if not prefix or "/" in prefix:
            raise UsageError(f"{prefix!r} cannot begin the name of a shard")
        self.folder = Path(folder)
        self.prefix = prefix
        self.max_samples = max_samples
        self.shards: list[Path] = []
        self._keys: set[str] = set()
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._num_open_samples = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.glob(f"{prefix}-[0-9]*.tar")):
            raise UsageError(
                f"the folder already holds shards named {prefix}-*.tar",
                where=str(self.folder),
                meaning="nothing was overwritten",
                mend="choose another folder or another prefix",
            )

    @property
    def num_samples(self) -> int:
        """Number of samples written so far."""
        return len(self._keys)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def write(self, key: str, fields: Mapping[str, object]) -> None:
        """Add one sample: an image as bytes (`jpg jpeg png webp`), `txt` a str, `json` an object, `cls` an int.

        Raises:
            DataError: a key that was written before or that would be read back differently, an empty caption, no field.
            UsageError: an unknown field or a value of the wrong type.
        """
        self._check_key(key)
        encoded = {name: _encode(key, name, value) for name, value in fields.items()}
        if not encoded:
            raise DataError("a sample needs at least one field", where=f"key {key!r}")
        if self._tar is None:
            self._open()
        self._tar.write({"__key__": key, **encoded})
        self._keys.add(key)
        self._num_open_samples += 1
        if self._num_open_samples == self.max_samples:
            self._finish()

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._finish()

    def _check_key(self, key: str) -> None:
        if not _KEY.match(key):
            raise DataError(
                "the key would be read back as another one",
                where=f"key {key!r}",
                mend="use a name without dots, not of the form __x__; folders may be part of it",
            )
        if key in self._keys:
            raise DataError("the key was written before", where=f"key {key!r}", mend="give each sample its own key")

    def _next_path(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.shards):05d}.tar"

    def _open(self) -> None:
        import webdataset  # here, because it loads torch (2 s), which no other part of data_tools needs

        self._file = temporary_name(self._next_path()).open("wb")  # closed in _finish or _abandon
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, mtime=0, user="mmvit", group="mmvit", mode=0o644, format="PAX_FORMAT"
        )

    def _finish(self) -> None:
        assert self._file is not None
        final = self._next_path()
        temporary = temporary_name(final)
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            index = index_bytes(scan_tar(temporary))
            rename_synced(temporary, final)
            write_atomic(index_path(final), index)  # until now the tar is one without an index, which is valid
        except BaseException:
            self._abandon()
            raise
        self.shards.append(final)
        self._file = self._tar = None
        self._num_open_samples = 0

    def _abandon(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):  # the disk is full, or the file is closed already
                self._tar.close()
            with contextlib.suppress(OSError):
                self._file.close()
            temporary_name(self._next_path()).unlink(missing_ok=True)
        self._file = self._tar = None


def _encode(key: str, field: str, value: object) -> bytes:
    if field not in FIELDS:
        raise UsageError(f"unknown field {field!r}", where=f"key {key!r}", mend=did_you_mean(field, FIELDS) or None)
    if field in IMAGE_FIELDS and isinstance(value, bytes) and value:
        return value
    if field == "txt" and isinstance(value, str):
        if not value.strip():
            raise DataError("the caption is empty", where=f"key {key!r}", mend="leave the sample out")
        return value.encode()
    if field == "json":
        return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    if field == "cls" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value).encode()
    raise UsageError(
        f"a {type(value).__name__} cannot be the field {field!r}",
        where=f"key {key!r}",
        mend="images are bytes that are not empty, txt is a str, cls an int that is not negative",
    )
