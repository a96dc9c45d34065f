"""Samples of many shards under one running number."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import SupportsIndex

from data_tools.core.errors import SampleError, UsageError
from data_tools.sample.content import FaultError, Label, read_label
from data_tools.tar.index import open_indexes
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.reader import ShardReader
from data_tools.tar.scan import NOTICES
from data_tools.tar.shard_names import ShardNames
from mmvit.data.source import OTHER_FIELDS, RawSample, SampleSource, raw_sample

logger = logging.getLogger(__name__)


class IndexedShards(SampleSource):
    """The samples of `paths`, numbered 0 .. len - 1 in the order of the shards and, within a shard, of the tar.

    It may be used after a fork, by several threads, and may be sent to data loader workers.

    Args:
        paths: the shards, as from `data_tools.tar.expand.expand_shards`. An index that is missing or stale is made.
        verify: compare each member that is read with the SHA-256 in the index, see `ShardReader`.
        require_caption: False also delivers samples without `txt` or with a blank one (images with a label alone).

    Raises:
        UsageError: no paths.
        DataError: a shard is missing or without samples.
        CheckpointError: an index is damaged.
    """

    def __init__(self, paths: Sequence[LocationLike], verify: bool = False, require_caption: bool = True):
        if not paths:
            raise UsageError("no shards were given", hint="name a tar file, a folder of tars, or a pattern")
        self.paths = [Location(path) for path in paths]
        self.names = ShardNames(self.paths)
        self.require_caption = require_caption
        self.reader = ShardReader(open_indexes(self.paths), verify)
        self.shard_sizes: tuple[int, ...] = tuple(len(index) for index in self.reader.indexes)
        self.num_samples: int = sum(self.shard_sizes)
        self._stops = list(accumulate(self.shard_sizes))
        lost = Counter(error.cause for error in self.lost())
        if lost:
            causes = ", ".join(f"{count} {cause}" for cause, count in lost.most_common())
            logger.warning("samples of the shards are lost (%s); for a list run: mmvit-data check SHARDS", causes)

    def __len__(self) -> int:
        return self.num_samples

    def key(self, i: SupportsIndex) -> str:
        """Return "shard.tar/key" of sample `i`, with as much of the shard's path as `ShardNames` says."""
        shard, local = self.place(i)
        return f"{self.names[shard]}/{self.reader.indexes[shard].key(local)}"

    def fields(self, i: SupportsIndex, wanted: Sequence[str] | None = None) -> dict[str, bytes]:
        """Return the stored bytes of each field of sample `i`; raises as `ShardReader.fields`."""
        return self.reader.fields(*self.place(i), wanted)

    def read(self, i: SupportsIndex, *, image: bool = True) -> RawSample:
        """Return sample `i`; False for `image` reads nothing of its image, whether there is one or not.

        Raises:
            SampleError: naming shard and key: as `raw_sample`, or bytes that are not those that were indexed.
        """
        fields = self.fields(i, None if image else OTHER_FIELDS)
        return raw_sample(
            self.key(i),
            fields,
            lambda cause, what: self.error(cause, what, i),
            image=image,
            require_caption=self.require_caption,
        )

    def label(self, i: SupportsIndex) -> Label | None:
        """Return the class of sample `i`, None where it has none, without reading anything else of it."""
        try:
            return read_label(self.fields(i, ("cls",)))
        except FaultError as error:
            raise self.error(*error.fault, i) from error

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the shards' names and contents, from the headers of their indexes.

        It does not change when shards are moved or copied, and does when a sample, its order or its bytes do.
        """
        contents = [index.header["content_sha256"] for index in self.reader.indexes]
        names = [path.name for path in self.paths]
        return hashlib.sha256(json.dumps([names, self.shard_sizes, contents]).encode()).hexdigest()

    def lost(self) -> list[SampleError]:
        """Return what the tars were found to have lost when they were indexed: it can never be delivered."""
        return [
            SampleError(problem.cause, problem.detail, shard=index.tar, key=problem.key)
            for index in self.reader.indexes
            if index.problem_counts.keys() - NOTICES.keys()
            for problem in index.problems()
            if problem.cause not in NOTICES and not (problem.cause == "hash" and index.header["changed"])
        ]

    def place(self, i: SupportsIndex) -> tuple[int, int]:
        """Return the number of the shard of sample `i` and its number there."""
        number = operator.index(i)
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} samples, not a sample {number}")
        shard = bisect_right(self._stops, number)
        return shard, number - self._stops[shard] + self.shard_sizes[shard]

    def shard(self, i: SupportsIndex) -> str:
        """Name the shard of sample `i` without reading anything."""
        return str(self.paths[self.place(i)[0]])

    def error(self, cause: str, what: str, i: SupportsIndex) -> SampleError:
        """Return an error that names sample `i`."""
        return self.reader.error(cause, what, *self.place(i))
