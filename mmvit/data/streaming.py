"""Samples of shards that cannot be read by offset: each is fetched whole, one after the other, without end.

A webdataset pipeline whose tar stage is the project's own: that of webdataset takes a damaged header for the end of the
tar, unpacks compressed tars and fills the holes of sparse members. Nothing is decoded by it, so nothing is unpickled.
"""

import hashlib
import itertools
import json
import logging
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from data_tools.core.errors import DataError, ResourceError, SampleError
from data_tools.tar.byte_file import ByteFile, UnindexableError
from data_tools.tar.index import open_index
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.open import open_file
from data_tools.tar.remote import fetch
from data_tools.tar.scan import NOTICES, Member, Problem, ScannedTar, scan_tar
from data_tools.tar.shard_names import ShardNames
from mmvit.data.shards import IndexedShards
from mmvit.data.source import OTHER_FIELDS, RawSample, Reading, SampleSource, raw_sample

logger = logging.getLogger(__name__)

_BUFFER = 200  # samples that are mixed over the ends of shards; they wait on disk


class Share(NamedTuple):
    """One reader's part of a shard: sample `part` and every `num_parts`-th after it."""

    shard: int
    part: int
    num_parts: int


class _Item(NamedTuple):
    """A sample that waits for its turn, or what was lost."""

    shard: int
    key: str
    file: ByteFile
    members: dict[str, Member]
    problem: Problem | None


def open_shards(
    paths: Sequence[LocationLike], verify: bool = False, require_caption: bool = True, announce: bool = True
) -> SampleSource:
    """Open shards by their indexes, or `StreamedShards` where one of them cannot be read by offset.

    Arguments and errors are those of `IndexedShards`; `announce` logs that shards are streamed; one rank does.
    """
    try:
        return IndexedShards(paths, verify, require_caption)
    except UnindexableError as error:
        if announce:
            logger.warning(
                "%s (%s): the shards are streamed, their order and resume are approximate\n"
                "  note: each worker keeps up to three shards in the temporary folder (TMPDIR)\n"
                "  hint: copy the shards to a disk, or to a server with byte ranges",
                *(error.what, error.where),
            )
        return StreamedShards(paths, require_caption)


def split_shards(order: Sequence[int], epoch: int, reader: int, num_readers: int) -> list[Share]:
    """Return what one of several readers takes of an epoch: together they take each sample once, and none goes idle.

    More readers than shards share the samples of a shard, each having others every epoch.
    """
    if len(order) >= num_readers:
        return [Share(shard, 0, 1) for shard in order[reader::num_readers]]
    turn, place = divmod(reader, len(order))
    num_parts = len(range(place, num_readers, len(order)))
    return [Share(order[place], (turn + epoch) % num_parts, num_parts)]


class StreamedShards(SampleSource):
    """Shards read from begin to end, again and again."""

    num_samples: int | None = None

    def __init__(self, paths: Sequence[LocationLike], require_caption: bool = True):
        self.paths = [Location(path) for path in paths]
        self.names = ShardNames(self.paths)
        self.require_caption = require_caption
        self.shard_sizes = (1,)
        self._stream: Iterator[_Item] | None = None
        self._last: _Item | None = None
        self._note: Callable[[int], None] | None = None

    def begin(self, reading: Reading, note: Callable[[int], None]) -> Callable[[int], None]:
        """Begin to read, once; the order of the shards follows from `reading`. Shards that are waited for are noted."""
        self._note = note
        if self._stream is None:
            self._stream = self._started(reading)
        return lambda i: note(self._last.shard) if self._last else None

    def read(self, i: SupportsIndex, *, image: bool = True) -> RawSample:
        """Return the next sample.

        Raises:
            SampleError: it was lost, has changed, or is as `raw_sample` refuses it.
            DataError: a shard is missing or without samples.
            ResourceError: a server does not answer.
        """
        assert self._stream is not None, "begin() comes first"
        item = self._last = next(self._stream)
        if item.problem is not None:
            raise self.error(item.problem.cause, item.problem.detail, i)
        wanted = item.members if image else OTHER_FIELDS
        fields = {
            field: item.file.read(member.offset, member.size)
            for field, member in item.members.items()
            if field in wanted
        }
        for field, data in fields.items():
            if hashlib.sha256(data).digest() != item.members[field].sha256:
                raise self.error("hash", f".{field} is damaged: it is not as it was scanned", i)
        return raw_sample(
            self.key(i),
            fields,
            lambda cause, what: self.error(cause, what, i),
            image=image,
            require_caption=self.require_caption,
        )

    def key(self, i: SupportsIndex) -> str:
        """Return "shard.tar/key" of the last sample, as `IndexedShards.key` does."""
        assert self._last is not None
        return f"{self.names[self._last.shard]}/{self._last.key}"

    def error(self, cause: str, what: str, i: SupportsIndex) -> SampleError:
        """Return an error that names the last sample, or shard number `i` while none is there."""
        shard, key = (self._last.shard, self._last.key) if self._last else (int(i), "")
        return SampleError(cause, what, shard=self.paths[shard], key=key)

    def shard(self, i: SupportsIndex) -> str:
        """Name shard number `i`."""
        return str(self.paths[int(i)])

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the shards' names; what is in them is not known."""
        return hashlib.sha256(json.dumps(["streamed", *(path.name for path in self.paths)]).encode()).hexdigest()

    def _started(self, reading: Reading) -> Iterator[_Item]:
        os.environ["WDS_SECURE"] = "1"  # looked at when it is imported: no pickles, no commands
        import webdataset

        seed, first, reader, num_readers = reading
        rng = random.Random(f"{seed} {first} {reader}")
        orders = (
            np.random.default_rng((seed, first, epoch)).permutation(len(self.paths)).tolist()
            for epoch in itertools.count()
        )
        shares = (
            share for epoch, order in enumerate(orders) for share in split_shards(order, epoch, reader, num_readers)
        )
        mixed = webdataset.shuffle(_BUFFER, rng=rng)
        return iter(webdataset.DataPipeline(lambda: self._items(shares, rng), mixed))

    def _items(self, shares: Iterator[Share], rng: random.Random) -> Iterator[_Item]:
        """Yield the samples of each share in random order, and what was lost; a thread fetches the next shard."""
        share, box = self._begin(next(shares))
        while True:
            self._last = None
            if self._note:
                self._note(share.shard)
            opened = box.get()
            if isinstance(opened, Exception):
                raise opened
            file, scan = opened
            pairs = zip(scan.keys, scan.samples, strict=True)
            items = [_Item(share.shard, key, file, members, None) for key, members in pairs]
            lost = [problem for problem in scan.problems if problem.cause not in (*NOTICES, "hash")]
            items += [_Item(share.shard, problem.key, file, {}, problem) for problem in lost]
            items = items[share.part :: share.num_parts]
            rng.shuffle(items)
            share, box = self._begin(next(shares))
            yield from items

    def _begin(self, share: Share) -> "tuple[Share, queue.SimpleQueue[tuple[ByteFile, ScannedTar] | Exception]]":
        box: queue.SimpleQueue[tuple[ByteFile, ScannedTar] | Exception] = queue.SimpleQueue()

        def open_it() -> None:
            try:
                box.put(_open(self.paths[share.shard]))
            except Exception as error:  # raised again where the shard is waited for
                box.put(error)

        threading.Thread(target=open_it, daemon=True).start()
        return share, box


def _open(tar: Location) -> tuple[ByteFile, ScannedTar]:
    try:
        return open_file(tar), open_index(tar).scanned()
    except UnindexableError:
        file, broken = fetch(tar)
    try:
        scan = scan_tar(tar, file)
    except DataError as error:
        if broken:
            raise ResourceError(f"the shard cannot be fetched: {broken}", where=tar) from error
        raise
    reason = f" ({broken})" if broken else ""
    return file, scan._replace(problems=[each._replace(detail=each.detail + reason) for each in scan.problems])
