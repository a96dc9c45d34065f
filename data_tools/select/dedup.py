"""Finds duplicate images in shards, and writes the shards without the copies.

Exact copies have the same SHA-256 in the index: nothing is decoded for them. Near copies (re-encoded, resized, cropped
by one or two percent) have perceptual hashes that differ in a few bits and the same colours, which distinguishes images
that are similar only in grey: thumbnails of 16 x 16 px that differ by less than 8 of 255 on average and by less than 64
anywhere. An image is a copy only of one that is kept: the largest in px, and the first of equally large ones.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.core.errors import UsageError
from data_tools.core.files import write_atomic
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.sample.content import find_image
from data_tools.sample.decode import decode_image
from data_tools.sample.table import shard_metadata
from data_tools.select.write import Int64s, OutputOptions, SampleTable, WriteReport, owned_output, write_samples
from data_tools.tar.index import ShardIndex, open_indexes
from data_tools.tar.location import LocationLike
from data_tools.tar.reader import ShardReader
from data_tools.tar.scan import IMAGE_FIELDS

DUPLICATES = "duplicates.jsonl"
MAX_THRESHOLD = 12

_THUMBNAIL = 16  # px
_MAX_MEAN, _MAX_ANYWHERE = 8, 64  # of 255, difference between the thumbnails of near copies
_WINDOW = 200  # number of following images with the same sort key that an image is compared with
_PAIRS_AT_ONCE = 10_000
_MAX_SHOWN = 10


class Copy(NamedTuple):
    """A sample whose image is a copy of that of `kept`; `distance` in bits between their hashes, None if exact."""

    sample: int
    kept: int
    distance: int | None


class DedupReport(NamedTuple):
    """Result of a deduplication; `written` is None without an output folder."""

    samples: int
    copies: list[Copy]
    table: SampleTable
    written: WriteReport | None

    def groups(self) -> Iterator[dict[str, Any]]:
        """Yield for each image with copies the key of the kept sample and those of its copies."""
        groups: dict[int, list[Copy]] = defaultdict(list)
        for copy in self.copies:
            groups[copy.kept].append(copy)
        for kept, copies in sorted(groups.items()):
            listed = [{"key": self.table.full_key(copy.sample), "distance": copy.distance} for copy in copies]
            yield {"kept": self.table.full_key(kept), "copies": listed}

    def to_json(self) -> dict[str, Any]:
        """Return the counts as one JSON document."""
        distances = Counter(copy.distance for copy in self.copies if copy.distance is not None)
        return {
            "samples": self.samples,
            "kept": self.samples - len(self.copies),
            "groups": len({copy.kept for copy in self.copies}),
            "exact_copies": len(self.copies) - distances.total(),
            "near_copies": dict(sorted(distances.items())),
            "written": None if self.written is None else self.written._asdict(),
        }


def dedup_shards(
    tars: Sequence[LocationLike],
    *,
    threshold: int | None = 4,
    output: OutputOptions | None = None,
    report: Path | None = None,
    num_workers: int | None = None,
    engine: str = "local",
) -> DedupReport:
    """Find the copies among all images of the shards, and write the shards without them.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        threshold: number of bits in which the hashes of near copies may differ, 0 .. 12; None finds exact copies only.
        output: where the new shards are written; None only reports.
        report: file for one JSON line per group; with `output` also written to that folder, as `duplicates.jsonl`.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        UsageError: the threshold or folder is invalid.
    """
    if threshold is not None and not 0 <= threshold <= MAX_THRESHOLD:
        what = f"the threshold must be 0 .. {MAX_THRESHOLD} bits, got {threshold}"
        raise UsageError(what, hint=f"--threshold 4; {MAX_THRESHOLD} finds the most")
    with owned_output(output):
        table = SampleTable(open_indexes(tars))
        first = _first_with_these_bytes(table)
        near: dict[int, tuple[int, int]] = {}  # sample -> (kept sample, bits)
        if threshold is not None:
            near = _near_copies(table, tars, first, threshold, num_workers, engine)
        copies = []
        for sample, original in enumerate(first.tolist()):
            if original in near:
                copies.append(Copy(sample, *near[original]))
            elif original != sample:
                copies.append(Copy(sample, original, None))
        found = DedupReport(len(table), copies, table, None)
        lines = [json.dumps(group, ensure_ascii=False) for group in found.groups()]
        if report is not None:
            write_atomic(report, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
        if output is None:
            return found
        chosen = np.setdiff1d(np.arange(len(table)), [copy.sample for copy in copies])
        return found._replace(written=write_samples(table, chosen, output, verb="dedup", lists={DUPLICATES: lines}))


def describe(report: DedupReport) -> str:
    """Return the report as text, with the largest groups."""
    numbers = report.to_json()
    lines = [f"{numbers['samples']} samples: {len(report.copies)} copies of {numbers['groups']} images"]
    lines.append(f"  identical bytes       {numbers['exact_copies']:>9}")
    lines += [f"  {bits:>2} bits of difference {num:>9}" for bits, num in numbers["near_copies"].items()]
    groups = sorted(report.groups(), key=lambda group: -len(group["copies"]))[:_MAX_SHOWN]
    for group in groups:
        keys = [copy["key"] for copy in group["copies"]]
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        lines.append(f"  {group['kept']}: {', '.join(keys[:3])}{more}")
    if numbers["groups"] > len(groups):
        lines.append(f"  ... {numbers['groups'] - len(groups)} more groups: --report FILE lists all")
    return "\n".join(lines if report.written is None else [*lines, report.written.describe()])


def _first_with_these_bytes(table: SampleTable) -> Int64s:
    """Return for each sample the first one whose image has the same SHA-256, itself if it has no image."""
    digests = b"".join(_digest(index, i) for index in table.indexes for i in range(len(index)))
    known = np.frombuffer(digests, "S32")
    _, first, group = np.unique(known, return_index=True, return_inverse=True)
    return np.where(known == b"", np.arange(len(known)), first[group])


def _digest(index: ShardIndex, i: int) -> bytes:
    digests = (index.digest(i, field) for field in IMAGE_FIELDS if field in index.fields)
    return next(filter(any, digests), bytes(32))  # zeros: the sample has no image


def _near_copies(
    table: SampleTable,
    tars: Sequence[LocationLike],
    first: Int64s,
    threshold: int,
    num_workers: int | None,
    engine: str,
) -> dict[int, tuple[int, int]]:
    metadata = shard_metadata(tars, with_phash=True, num_workers=num_workers, engine=engine)
    samples = np.flatnonzero((first == np.arange(len(first))) & metadata["phash"].is_valid().to_numpy())
    pixels = metadata["width"].to_numpy().astype(np.float64) * metadata["height"].to_numpy()
    samples = samples[np.argsort(-pixels[samples], kind="stable")]  # the first of each group in this order is kept
    hashes = metadata["phash"].fill_null(0).to_numpy()[samples]
    left, right = close_pairs(hashes, threshold)
    same = _same_colours(table, samples, left, right, num_workers, engine)
    near: dict[int, tuple[int, int]] = {}
    gone = np.zeros(len(samples), bool)
    for a, b in zip(left[same].tolist(), right[same].tolist(), strict=True):
        if not (gone[a] or gone[b]):
            gone[b] = True
            near[int(samples[b])] = int(samples[a]), int(np.bitwise_count(hashes[a] ^ hashes[b]))
    return near


def close_pairs(hashes: NDArray[np.uint64], threshold: int) -> tuple[Int64s, Int64s]:
    """Return all pairs of indices a < b whose hashes differ in at most `threshold` bits, sorted.

    The 64 bits are split into threshold + 2 bands, of which two such hashes share at least two. Sorting by each pair of
    bands makes them adjacent, so n hashes need (threshold + 2) (threshold + 1) / 2 sorts instead of n^2 / 2
    comparisons. Of hashes that share two bands, each is compared with the next 200: in a larger group of copies about
    one in 200 is missed.
    """
    bounds = np.linspace(0, 64, threshold + 3).astype(int).tolist()
    bands = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(bounds)]
    pairs = [np.empty(0, np.int64)]
    for band, other in itertools.combinations(bands, 2):
        masked = hashes & np.uint64(band | other)
        order = np.argsort(masked, kind="stable")
        masked = masked[order]
        place = np.arange(len(order))
        for ahead in range(1, _WINDOW + 1):
            place = place[place + ahead < len(order)]
            place = place[masked[place] == masked[place + ahead]]
            if not len(place):
                break
            a, b = order[place], order[place + ahead]  # a < b: the sort is stable
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= threshold
            pairs.append(a[close] * len(hashes) + b[close])
    found = np.sort(np.concatenate(pairs))  # not np.unique, whose hash table is 10 times slower on such numbers
    left, right = np.divmod(found[np.diff(found, prepend=-1) > 0], max(1, len(hashes)))
    return left, right


def _same_colours(
    table: SampleTable, samples: Int64s, left: Int64s, right: Int64s, num_workers: int | None, engine: str
) -> NDArray[np.bool_]:
    """Return for each pair of indices into `samples` whether their thumbnails have the same colours."""
    places = np.unique(np.concatenate([left, right]))
    order = places[np.argsort(samples[places])]  # by shard
    tasks = [order[start : start + 200] for start in range(0, len(order), 200)]
    function = functools.partial(_thumbnails, ShardReader(table.indexes), table, samples)
    thumbnails = np.zeros((len(places), _THUMBNAIL * _THUMBNAIL * 3), np.uint8)
    work = run_tasks(function, tasks, num_workers=num_workers, engine=engine)
    for number, made in track(work, len(tasks), "comparing colours"):
        thumbnails[np.searchsorted(places, tasks[number])] = made
    same = np.zeros(len(left), bool)
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        a, b = (thumbnails[np.searchsorted(places, side[some])].astype(np.int16) for side in (left, right))
        difference = np.abs(a - b)
        same[some] = (difference.mean(axis=1) < _MAX_MEAN) & (difference.max(axis=1) < _MAX_ANYWHERE)
    return same


def _thumbnails(reader: ShardReader, table: SampleTable, samples: Int64s, task: Int64s) -> NDArray[np.uint8]:
    return np.stack([_thumbnail(reader, *table.place(sample)) for sample in samples[task].tolist()])


def _thumbnail(reader: ShardReader, shard: int, i: int) -> NDArray[np.uint8]:
    fields = reader.fields(shard, i)
    image = decode_image(fields[find_image(fields)])
    return np.asarray(image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)).ravel()
