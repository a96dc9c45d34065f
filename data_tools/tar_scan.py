"""Reads a tar from end to end and groups its members into samples, strictly: whatever would lose data is an error.

The standard library ends silently at a damaged header, at zero bytes inside the archive and at a cut; this scan does
not: the members must reach up to an end-of-archive block, and only some zero bytes may follow it. What no scan of a tar
can see is a last sample that was overwritten with zeros from its header on; only an index made before shows it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import DataError

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
FIELDS = (*IMAGE_FIELDS, "txt", "json", "cls")

_BLOCK = 512
_CHUNK = 1 << 20
_MAX_PADDING = 1 << 20  # a tar ends with zero bytes up to a full record: 10 KiB by default, more with `tar -b`
_NAME_RULE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset 1.0: tariterators.base_plus_ext
_META_RULE = re.compile(r"__[^/]*__($|/)")  # webdataset 1.0: tar_file_iterator(skip_meta=...)
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


class Member(NamedTuple):
    """Where one member's bytes lie in the tar, and their SHA-256."""

    offset: int
    size: int
    sha256: bytes


class ScannedTar(NamedTuple):
    """The samples of a tar: `samples[i]` maps the fields of `keys[i]` to their members."""

    size: int
    mtime_ns: int
    keys: list[str]
    samples: list[dict[str, Member]]
    ignored: Counter[str]


def scan_tar(tar: str | os.PathLike[str]) -> ScannedTar:
    """Read the tar once and return its samples.

    Members whose suffix is not in `FIELDS`, links and files without a suffix are ignored and counted by suffix.

    Raises:
        DataError: missing, compressed, truncated or damaged tar; members of a key that are not adjacent; a field that
            a sample has twice; no sample at all.
    """
    path = Path(tar)
    if not path.is_file():
        raise DataError("the shard does not exist", where=str(path), mend="check the path and the spelling")
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        _refuse_compressed(path, file.read(8))
        grouping = _Grouping(path)
        for info in _members(path, file.fileno(), stat.st_size):
            grouping.add(info, file.fileno())
    if not any(grouping.samples.values()):
        ignored = ", ".join(f"{count} x .{suffix}" for suffix, count in grouping.ignored.items()) or "none"
        raise DataError(
            f"the shard holds no sample (files of other kinds: {ignored})",
            where=str(path),
            mend=f"a sample needs a field of: {' '.join(FIELDS)}",
        )
    samples = {key: sample for key, sample in grouping.samples.items() if sample}
    return ScannedTar(stat.st_size, stat.st_mtime_ns, list(samples), list(samples.values()), grouping.ignored)


class _Grouping:
    """Collects members into samples and refuses what is not one clean run of members a key."""

    def __init__(self, path: Path):
        self.path = path
        self.samples: dict[str, dict[str, Member]] = {}
        self.ignored: Counter[str] = Counter()
        self._first_offsets: dict[str, int] = {}
        self._current: str | None = None

    def add(self, info: tarfile.TarInfo, fd: int) -> None:
        if info.isdir() or _META_RULE.match(info.name):
            return
        if not info.isreg():
            self.ignored["(link or device)"] += 1
            return
        if info.issparse():
            raise self._error(info, "a sparse member cannot be read by offset", "pack the files with tar without -S")
        match = _NAME_RULE.match(_printable(info.name))
        if match is None:
            self.ignored["(no suffix)"] += 1
            return
        key, field = match.group(1), match.group(2).lower()
        self._enter(key, info)
        if field not in FIELDS:
            self.ignored[field] += 1
            return
        if field in self.samples[key]:
            raise self._error(info, f"key {key!r} has the field {field!r} twice", "give each sample its own key")
        self.samples[key][field] = Member(info.offset_data, info.size, _digest(fd, info.offset_data, info.size))

    def _enter(self, key: str, info: tarfile.TarInfo) -> None:
        if key == self._current:
            return
        if key in self.samples:
            what = f"the members of key {key!r} are not adjacent: one is at byte {self._first_offsets[key]}"
            raise self._error(
                info, what, "pack the files in the order of their names: tar --sort=name -cf NEW.tar FOLDER"
            )
        self._current = key
        self._first_offsets[key] = info.offset
        self.samples[key] = {}

    def _error(self, info: tarfile.TarInfo, what: str, mend: str) -> DataError:
        where = f"{self.path}, member {_printable(info.name)!r} at byte {info.offset}"
        return DataError(what, where=where, meaning="the shard was not indexed", mend=mend)


def _members(path: Path, fd: int, tar_size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members in order, then check that the archive ends as an archive should."""
    end = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (info := archive.next()) is not None:
                start, end = end, archive.offset  # where the next header should be
                if end <= start or info.size < 0:
                    raise _broken(path, start, "the header here is damaged")
                if end > tar_size:
                    raise _truncated(path, f"member {_printable(info.name)!r} at byte {info.offset} is cut")
                yield info
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(
            f"the file is not a readable tar ({error})", where=str(path), mend="get or make the shard again"
        ) from error
    header = os.pread(fd, _BLOCK, end)
    if len(header) < _BLOCK:
        raise _truncated(path, f"the archive stops at byte {tar_size} without its end mark")
    if any(header):
        raise _broken(path, end, "the header here is damaged")
    if tar_size - end > _MAX_PADDING:
        raise _broken(path, end, f"its last {tar_size - end} bytes are not part of any member")
    for start in range(end + _BLOCK, tar_size, _CHUNK):
        chunk = os.pread(fd, _CHUNK, start)
        if any(chunk):
            first = start + len(chunk) - len(chunk.lstrip(b"\0"))
            raise _broken(path, first, "there is data after the end mark (zero bytes inside, or two tars in one file)")


def _truncated(path: Path, how: str) -> DataError:
    return DataError(
        f"the shard is truncated: {how}",
        where=str(path),
        meaning="the shard was not indexed",
        mend="copy or download the shard again",
    )


def _broken(path: Path, offset: int, how: str) -> DataError:
    return DataError(
        f"the shard is damaged: {how}",
        where=f"{path}, byte {offset}",
        meaning="what follows would be lost in silence; the shard was not indexed",
        mend="copy, download or make the shard again",
    )


def _refuse_compressed(path: Path, head: bytes) -> None:
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                "a compressed tar cannot be read by offset",
                where=str(path),
                meaning="images are compressed already, a plain tar is hardly larger",
                mend=f"{program} {path}",
            )


def _digest(fd: int, offset: int, size: int) -> bytes:
    sha256 = hashlib.sha256()
    for start in range(offset, offset + size, _CHUNK):
        sha256.update(os.pread(fd, min(_CHUNK, offset + size - start), start))
    return sha256.digest()


def _printable(name: str) -> str:
    r"""Return a member name with bytes that are not UTF-8 written as \xNN, so that a key is always valid text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
