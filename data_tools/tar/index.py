"""Builds, opens and updates the index of a shard: for each sample the offset, size and SHA-256 of its members.

Keys follow webdataset: the base name is split at its first dot, the folder is part of the key, members called `__x__`
are skipped and fields are lower-cased. `data_tools.tar.scan` reads the tar, `data_tools.tar.index_file` defines the
format.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.core.errors import CheckpointError, DataError
from data_tools.core.files import write_atomic
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.tar.byte_file import ByteFile
from data_tools.tar.index_file import MAGIC, MAX_HEAD_BYTES, index_bytes, read_body, read_header
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.open import open_file
from data_tools.tar.scan import Member, Problem, ScannedTar, scan_tar

logger = logging.getLogger(__name__)

_MANY_BYTES = 1 << 30
_MAX_MAPS = 256  # each keeps a file open
_maps: deque[weakref.ref[ShardIndex]] = deque()


def index_path(tar: LocationLike) -> Path:
    """Return the path of the index of `tar`: next to it, or in the user's cache folder for a URL."""
    location = Location(tar)
    if location.is_remote:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "mmvit" / "indexes" / f"{location.file_id}.idx"
    return location.next_to(".idx").path


class ShardIndex:
    """The index of one shard; the header is read immediately, the body is memory-mapped and verified on first use.

    Args:
        tar: path or URL of the shard.
        data: the bytes of an index that is not on disk; None reads `index_path(tar)`.

    Raises:
        CheckpointError: the index is damaged (header and file size: immediately; body: on first use).
    """

    def __init__(self, tar: LocationLike, data: bytes | None = None):
        self.tar = Location(tar)
        self._data = data
        self._arrays: dict[str, np.ndarray[Any, Any]] | None = None
        try:
            if data is not None:
                self.header = read_header(data[:MAX_HEAD_BYTES], len(data))
            else:
                with index_path(tar).open("rb") as file:
                    head = file.readline(len(MAGIC)) + file.readline(MAX_HEAD_BYTES)
                    self.header = read_header(head, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise _damaged(tar, error) from error
        self.num_samples: int = self.header["num_samples"]
        self.fields: tuple[str, ...] = tuple(self.header["fields"])
        self.ignored: dict[str, int] = self.header["ignored"]
        self.problem_counts: dict[str, int] = self.header["problems"]
        self.tar_size: int = self.header["tar_size"]

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # each process opens its own memory map

    def key(self, i: int) -> str:
        """Return the key of sample `i`, without the shard's name."""
        arrays = self._body()
        start, stop = arrays["key_offsets"][self._checked(i) : i + 2].tolist()
        return arrays["keys"][start:stop].tobytes().decode("utf-8", "replace")

    def keys(self) -> Iterator[str]:
        """Yield the keys of all samples in order."""
        return (self.key(i) for i in range(self.num_samples))

    def locate(self, i: int) -> dict[str, tuple[int, int]]:
        """Return field -> (offset, size) in bytes for the fields of sample `i`."""
        row = self._body()["places"][self._checked(i)].tolist()
        return {
            field: (row[j], row[j + 1])
            for field, j in zip(self.fields, range(0, len(row), 2), strict=True)
            if row[j] >= 0
        }

    def digest(self, i: int, field: str) -> bytes:
        """Return the SHA-256 (32 bytes) of one member at the time of indexing."""
        return bytes(self._body()["sha256"][self._checked(i), self.fields.index(field)])

    def problems(self) -> list[Problem]:
        """Return the problems of the tar at the time of indexing."""
        lines = self._body()["problems"].tobytes().splitlines()
        try:
            rows = [json.loads(line) for line in lines]
            return [Problem(str(cause), int(offset), str(key), str(detail)) for cause, offset, key, detail in rows]
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise _damaged(self.tar, "its list of problems cannot be read") from error

    def scanned(self) -> ScannedTar:
        """Return the index in the form of the scan that it was built from."""
        samples = [
            {field: Member(*place, self.digest(i, field)) for field, place in self.locate(i).items()}
            for i in range(self.num_samples)
        ]
        ignored = Counter(self.ignored)
        return ScannedTar(
            self.tar_size, self.header["tar_mtime_ns"], list(self.keys()), samples, ignored, self.problems()
        )

    def is_fresh(self, file: ByteFile) -> bool:
        """Return whether the tar still has the size and modification time that it had when it was indexed."""
        return file.size == self.tar_size and file.mtime_ns in (0, self.header["tar_mtime_ns"])

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"{self.tar} has {self.num_samples} samples, not a sample {i}")
        return i

    def _body(self) -> dict[str, np.ndarray[Any, Any]]:
        arrays = self._arrays
        if arrays is not None:
            return arrays
        try:
            if self._data is not None:
                arrays = self._arrays = read_body(self.header, self._data)
            else:
                with index_path(self.tar).open("rb") as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                arrays = self._arrays = read_body(self.header, data)
                _maps.append(weakref.ref(self))
        except (OSError, ValueError) as error:
            raise _damaged(self.tar, error) from error
        while len(_maps) > _MAX_MAPS:
            oldest = _maps.popleft()()
            if oldest is not None:
                oldest._arrays = None  # threads that use it keep a reference
        return arrays


def build_index(tar: LocationLike) -> ShardIndex:
    """Read the whole tar and write its index.

    If the folder is not writable or the disk is full, the index is kept in memory, with a logged warning.

    Raises:
        DataError: the tar is missing, compressed or contains no sample.
    """
    return _write(Location(tar), scan_tar(tar))


def open_index(tar: LocationLike) -> ShardIndex:
    """Open the index of `tar`; it is built on first use.

    If the size or modification time of the tar has changed, the tar is scanned again. If all samples of the index are
    still there, the index is updated. If some differ, the index remains authoritative: it is returned with the current
    offsets of samples and `changed` in its header, so that all bytes read are verified against their hash.

    Raises:
        CheckpointError: the index is damaged (it is not replaced silently, because its hashes reveal damage of the
            tar), or none of its samples is in the tar any more.
        DataError: the tar is missing, or `build_index` cannot read it.
    """
    location = Location(tar)
    if not _is_missing(index_path(location)):
        index = ShardIndex(location)
    elif location.is_remote:
        index = _fetch(location) or build_index(location)
    else:
        index = build_index(location)
    return index if index.is_fresh(open_file(location)) else _renewed(index)


def open_indexes(
    tars: Sequence[LocationLike], rebuild: bool = False, *, num_workers: int | None = None, engine: str | None = None
) -> list[ShardIndex]:
    """Open the indexes of many tars; missing ones, or all with `rebuild`, are built in parallel.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        rebuild: build every index again.
        num_workers: threads or processes; None uses one per core.
        engine: see `run_tasks`. None uses threads of this process: they share the GIL, and two are hardly faster than
            one. "local" uses processes if there is more than a second of work.

    Raises:
        CheckpointError, DataError: as for `open_index`.
    """
    locations = [Location(tar) for tar in tars]
    missing = [tar for tar in locations if rebuild or _is_missing(index_path(tar))]
    make = build_index if rebuild else open_index
    num_threads = num_workers or min(16, os.cpu_count() or 1)
    if any(tar.is_remote for tar in locations):
        num_threads = 16  # they wait for the network, not for a core
    with ThreadPoolExecutor(num_threads) as pool:
        if engine is None or (engine == "local" and _local_bytes(missing) < _MANY_BYTES):
            done: Iterator[tuple[int, ShardIndex]] = enumerate(pool.map(make, missing))
        else:
            done = run_tasks(make, missing, num_workers=num_workers, engine=engine)
        made = {missing[number]: index for number, index in track(done, len(missing), "indexing shards")}
        return list(pool.map(lambda tar: made[tar] if tar in made else open_index(tar), locations))


def _local_bytes(tars: Sequence[Location]) -> int:
    paths = [tar.path for tar in tars if not tar.is_remote]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _fetch(tar: Location) -> ShardIndex | None:
    """Copy the index next to a remote shard into the cache and return it, None if there is none."""
    shard = open_file(tar)
    try:
        file = open_file(tar.next_to(".idx"))
        data = file.read(0, file.size) if file.read(0, len(MAGIC)) == MAGIC else None  # some servers send a page
    except DataError:
        data = None
    if data is not None:
        # It was built from a local file: from now on the server's modification time reveals changes.
        return _write(tar, ShardIndex(tar, data).scanned()._replace(mtime_ns=shard.mtime_ns))
    logger.info(
        "%s has no index next to it: its %.1f MiB are read once, and the index is stored in %s",
        *(tar, shard.size / 2**20, index_path(tar).parent),
    )
    return None


def _write(tar: Location, scan: ScannedTar) -> ShardIndex:
    data = index_bytes(scan)
    path = index_path(tar)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the index is kept in memory", path, error.strerror)
        return ShardIndex(tar, data)
    return ShardIndex(tar)


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:  # reported when it is opened
        return False
    return False


def _renewed(index: ShardIndex) -> ShardIndex:
    """Return the index of a modified tar: updated, or the old one with the current offsets of samples."""
    file = open_file(index.tar)
    old, new = index.scanned(), scan_tar(index.tar, file, may_be_empty=True)
    found = dict(zip(new.keys, new.samples, strict=True))
    samples, lost = [], []
    unseen = 0  # samples not found by the scan: without an index they would be lost
    for key, sample in zip(old.keys, old.samples, strict=True):
        now = {field: member for field, member in found.get(key, {}).items() if _is_same(member, sample.get(field))}
        samples.append(sample | now)
        missing = [member for field, member in sample.items() if field not in now]
        unseen += bool(missing)
        if any(hashlib.sha256(file.read(member.offset, member.size)).digest() != member.sha256 for member in missing):
            offset = min(member.offset for member in sample.values())
            lost.append(Problem("hash", offset, key, "it has changed since the tar was indexed"))
            samples[-1] = {field: _cut(member, new.size) for field, member in samples[-1].items()}
    if not unseen:
        renewed = _write(index.tar, new)
        if renewed.header["content_sha256"] != index.header["content_sha256"]:
            change = "samples or fields were added or reordered"
            logger.warning(
                "%s: since it was indexed, %s: %d samples, now %d", index.tar, change, len(index), len(renewed)
            )
        return renewed
    hint = f"copy the shard again, or if it was changed intentionally: mmvit-data index --rebuild {index.tar}"
    if len(lost) == len(samples):
        what = f"this is not the shard that was indexed: all of its {len(lost)} samples are missing or differ"
        raise CheckpointError(what, where=index.tar, note="nothing was read from it", hint=hint)
    effect = f"{len(lost)} of {len(samples)} samples are missing or differ and will be skipped"
    if not lost:
        effect = f"there is damage, but all {len(samples)} samples are intact"
    logger.warning("%s has changed since it was indexed: %s\n  hint: %s", index.tar, effect, hint)
    merged = ScannedTar(new.size, new.mtime_ns, old.keys, samples, new.ignored, old.problems + lost)
    return ShardIndex(index.tar, index_bytes(merged, len(lost)))


def _is_same(member: Member, indexed: Member | None) -> bool:
    return indexed is not None and member.sha256 == indexed.sha256


def _cut(member: Member, tar_size: int) -> Member:
    """Return the part of a member that lies within the tar; its bytes do not match the hash."""
    offset = min(member.offset, tar_size)
    return Member(offset, min(member.size, tar_size - offset), member.sha256)


def _damaged(tar: LocationLike, how: object) -> CheckpointError:
    path = index_path(tar)
    return CheckpointError(
        f"the shard index is damaged: {how}",
        where=path,
        note="nothing was read from the shard; the shard itself is unchanged",
        hint=f"mmvit-data index --rebuild {Location(tar)}",
    )
