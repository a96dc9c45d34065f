"""Writes samples to shards, atomically and with their index; equal samples result in byte-identical shards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from data_tools.core.errors import DataError, UsageError, did_you_mean
from data_tools.core.files import rename_synced, temporary_name, write_atomic
from data_tools.tar.index import index_path
from data_tools.tar.index_file import index_bytes
from data_tools.tar.scan import FIELDS, IMAGE_FIELDS, scan_tar

_KEY = re.compile(r"^(?!/)(?!__[^/]*__($|/))(?:[^/\0\n]+/)*[^./\0\n]+$")


class ShardWriter:
    """Writes `PREFIX-00000.tar`, `PREFIX-00001.tar`, ... and the index of each; use it in a `with` block.

    A shard is written under a temporary name, synced, indexed and renamed. If the block ends with an exception, the
    unfinished shard is removed and the finished ones are kept.

    Args:
        folder: output folder, created if it does not exist.
        prefix: prefix of the shards' names.
        max_samples: maximum number of samples per shard, at least 1.
        first_number: number of the first shard, so that several processes can write the shards of one data set.

    Raises:
        UsageError: arguments are invalid, or a shard of this name already exists; nothing is overwritten.
    """

    def __init__(
        self, folder: str | os.PathLike[str], prefix: str = "shard", max_samples: int = 1000, first_number: int = 0
    ):
        if max_samples < 1:
            raise UsageError(f"a shard needs at least 1 sample, got max_samples={max_samples}")
        if not prefix or "/" in prefix:
            raise UsageError(f"{prefix!r} is not a valid prefix of shard names")
        self.folder = Path(folder)
        self.prefix = prefix
        self.max_samples = max_samples
        self.first_number = first_number
        self.shards: list[Path] = []
        self._keys: set[str] = set()
        self._file: IO[bytes] | None = None
        self._tar: tarfile.TarFile | None = None
        self._num_open_samples = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._final = self._next_path()

    @property
    def num_samples(self) -> int:
        """Return the number of samples written so far."""
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
        """Write one sample: image bytes (`jpg jpeg png webp`), `txt` a str, `json` an object, `cls` an int or str.

        Raises:
            DataError: the key was already written or would be read back differently, the caption is empty, or there is
                no field.
            UsageError: a field is unknown or a value has the wrong type.
        """
        self._check_key(key)
        encoded = {name: _encode(key, name, value) for name, value in fields.items()}
        self._add(key, encoded)

    def copy(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Copy one sample of another shard: its bytes are written unchanged.

        Raises:
            DataError: as for `write`.
        """
        self._check_key(key)
        self._add(key, fields)

    def _add(self, key: str, fields: Mapping[str, bytes]) -> None:
        if not fields:
            raise DataError("a sample needs at least one field", where=f"key {key!r}")
        tar = self._tar or self._open()
        for field in sorted(fields):
            tar.addfile(_member(f"{key}.{field}", len(fields[field])), io.BytesIO(fields[field]))
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
                "the key would be read back as a different one",
                where=f"key {key!r}",
                hint="use a name without dots, not of the form __x__; it may contain folders",
            )
        if key in self._keys:
            raise DataError("the key was already written", where=f"key {key!r}", hint="use a unique key per sample")

    def _next_path(self) -> Path:
        path = self.folder / f"{self.prefix}-{self.first_number + len(self.shards):05d}.tar"
        if path.exists():
            raise UsageError(
                "the folder already contains a shard of this name",
                where=str(path),
                note="nothing was overwritten",
                hint="choose another folder or another prefix",
            )
        return path

    def _open(self) -> tarfile.TarFile:
        self._final = self._next_path()
        self._file = temporary_name(self._final).open("wb")  # closed in _finish or _abandon
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        return self._tar

    def _finish(self) -> None:
        assert self._file is not None
        assert self._tar is not None
        final = self._final
        temporary = temporary_name(final)
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            index = index_bytes(scan_tar(temporary))
            rename_synced(temporary, final)
            write_atomic(index_path(final), index)  # a tar without an index, as before this line, is valid
        except BaseException:
            self._abandon()
            raise
        self.shards.append(final)
        self._file = self._tar = None
        self._num_open_samples = 0

    def _abandon(self) -> None:
        if self._file is not None and self._tar is not None:
            with contextlib.suppress(OSError, ValueError):  # the disk is full, or the file is already closed
                self._tar.close()
            with contextlib.suppress(OSError):
                self._file.close()
            temporary_name(self._final).unlink(missing_ok=True)
        self._file = self._tar = None


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # its modification time is 0: equal samples result in equal bytes
    member.size = size
    member.mode = 0o644
    member.uname = member.gname = "mmvit"
    return member


def _encode(key: str, field: str, value: object) -> bytes:
    if field not in FIELDS:
        raise UsageError(f"unknown field {field!r}", where=f"key {key!r}", hint=did_you_mean(field, FIELDS) or None)
    if field in IMAGE_FIELDS and isinstance(value, bytes) and value:
        return value
    if field == "txt" and isinstance(value, str):
        if not value.strip():
            raise DataError("the caption is empty", where=f"key {key!r}", hint="skip the sample")
        return value.encode()
    if field == "json":
        return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    if field == "cls" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value).encode()
    if field == "cls" and isinstance(value, str) and value.strip():
        return value.encode()
    raise UsageError(
        f"a {type(value).__name__} is not a valid value of the field {field!r}",
        where=f"key {key!r}",
        hint="images are non-empty bytes, txt is a str, cls a class name or a non-negative int",
    )
