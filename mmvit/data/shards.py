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
from typing import Any, NamedTuple, SupportsIndex

from data_tools.core.errors import SampleError, UsageError
from data_tools.tar.index import open_indexes
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.reader import ShardReader
from data_tools.tar.scan import IMAGE_FIELDS, NOTICES

logger = logging.getLogger(__name__)


class RawSample(NamedTuple):
    """One sample as it is stored: `key` is "shard.tar/key", `image` the encoded file, `label` the class index.

    `image` is empty where it was left out.
    """

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any] | None
    label: int | None


class IndexedShards:
    """The samples of `paths`, numbered 0 .. len - 1 in the order of the shards and, within a shard, of the tar.

    It may be used after a fork, by several threads, and may be sent to data loader workers.

    Args:
        paths: the shards, as from `data_tools.tar.expand.expand_shards`. An index that is missing or stale is made.
        verify: compare each member that is read with the SHA-256 in the index, see `ShardReader`.
        require_caption: False gives "" where a sample has no `txt` (pictures that only have a label).

    Raises:
        UsageError: no paths.
        DataError: a shard is missing or without samples.
        CheckpointError: an index is damaged.
    """

    def __init__(self, paths: Sequence[LocationLike], verify: bool = False, require_caption: bool = True):
        if not paths:
            raise UsageError("no shards were given", hint="name a tar file, a folder of tars, or a pattern")
        self.paths = [Location(path) for path in paths]
        self.require_caption = require_caption
        self.reader = ShardReader(open_indexes(self.paths), verify)
        self.shard_sizes: tuple[int, ...] = tuple(len(index) for index in self.reader.indexes)
        self._stops = list(accumulate(self.shard_sizes))
        lost = Counter(error.cause for error in self.lost())
        if lost:
            causes = ", ".join(f"{count} {cause}" for cause, count in lost.most_common())
            logger.warning("the shards have lost samples (%s); what and where: mmvit-data check SHARDS", causes)

    def __len__(self) -> int:
        return self._stops[-1]

    def key(self, i: SupportsIndex) -> str:
        """Return "shard.tar/key" of sample `i`; the shard's folder is not part of it."""
        shard, local = self.place(i)
        return f"{self.paths[shard].name}/{self.reader.indexes[shard].key(local)}"

    def fields(self, i: SupportsIndex, wanted: Sequence[str] | None = None) -> dict[str, bytes]:
        """Return the stored bytes of each field of sample `i`; raises as `ShardReader.fields`."""
        return self.reader.fields(*self.place(i), wanted)

    def read(self, i: SupportsIndex, *, image: bool = True) -> RawSample:
        """Return sample `i`; False for `image` reads nothing of its image, whether there is one or not.

        Raises:
            SampleError: naming shard and key: no image, an empty caption, text that is not UTF-8 or holds NUL, bad
                metadata or label, or bytes that are not those that were indexed.
        """
        fields = self.fields(i, None if image else ("txt", "json", "cls"))
        data = next((fields[field] for field in IMAGE_FIELDS if field in fields), None)
        if image and not data:
            what = "the image is an empty file" if data is not None else f"its fields are: {' '.join(fields) or 'none'}"
            raise self.error("no-image", f"the sample has no image: {what}", i)
        rest = self._caption(fields, i), self._meta(fields, i), self._label(fields, i)
        return RawSample(self.key(i), data or b"", *rest)

    def caption(self, i: SupportsIndex) -> str:
        """Return the caption of sample `i` without reading its image."""
        return self._caption(self.fields(i, ("txt",)), i)

    def meta(self, i: SupportsIndex) -> dict[str, Any] | None:
        """Return the JSON object of sample `i`, None where it has none, without reading its image."""
        return self._meta(self.fields(i, ("json",)), i)

    def label(self, i: SupportsIndex) -> int | None:
        """Return the class index of sample `i`, None where it has none, without reading its image."""
        return self._label(self.fields(i, ("cls",)), i)

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

    def error(self, cause: str, what: str, i: SupportsIndex) -> SampleError:
        """Return an error that names sample `i`."""
        return self.reader.error(cause, what, *self.place(i))

    def _caption(self, fields: dict[str, bytes], i: SupportsIndex) -> str:
        caption = self._text(fields, "txt", i).strip() if "txt" in fields else ""
        if not caption and self.require_caption:
            if "txt" in fields:
                raise self.error("empty-caption", "the caption is empty", i)
            raise self.error("no-caption", "the sample has no caption", i)
        return caption

    def _meta(self, fields: dict[str, bytes], i: SupportsIndex) -> dict[str, Any] | None:
        if "json" not in fields:
            return None
        try:
            text = self._text(fields, "json", i)
            meta = json.loads(text)
            if "\\u" in text:  # escapes can spell what no text may hold: half a surrogate pair, or NUL
                if "\\u0000" in text:
                    raise ValueError("it holds a NUL character")
                json.dumps(meta, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise self.error("bad-json", f"the metadata is not JSON ({error})", i) from error
        if not isinstance(meta, dict):
            raise self.error("bad-json", f"the metadata is a {type(meta).__name__} instead of an object", i)
        return meta

    def _label(self, fields: dict[str, bytes], i: SupportsIndex) -> int | None:
        if "cls" not in fields:
            return None
        text = self._text(fields, "cls", i).strip()
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise self.error("bad-label", f"the label {text[:20]!r} is not a class index", i)
        return int(text)

    def _text(self, fields: dict[str, bytes], field: str, i: SupportsIndex) -> str:
        try:
            text = fields[field].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error("not-utf8", f".{field} is not UTF-8 (byte {error.start})", i) from error
        if "\0" in text:
            raise self.error("not-utf8", f".{field} holds a NUL character", i)
        return text
