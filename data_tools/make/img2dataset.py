"""What img2dataset wrote: tars of samples, its own account of how many there are, and what is missing of them."""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.core.errors import CAUSES, DataError, SampleError
from data_tools.core.progress import track
from data_tools.make.row import Row
from data_tools.sample.content import FaultError, find_image
from data_tools.tar.index import ShardIndex, open_index
from data_tools.tar.reader import ShardReader

_STATS = re.compile(r"^(\d+)_stats\.json$")
_TAR = re.compile(r"^(\d+)\.tar$")
_SHOWN_ERRORS = 3

Lost = dict[str, Any]  # an entry of rejected.jsonl


class Stats(NamedTuple):
    """The account of one shard: how many rows it had, and how many of them gave a sample."""

    num_rows: int
    successes: int
    errors: Counter[str]


class TarRows(NamedTuple):
    """The samples of several tars; `starts[i]` is the first row of tar i."""

    tars: tuple[str, ...]
    starts: tuple[int, ...]
    num_rows: int
    has_captions: bool

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of these numbers."""
        for number in numbers:
            tar = bisect.bisect_right(self.starts, number) - 1
            yield _read(_reader(self.tars[tar]), number - self.starts[tar])


@functools.lru_cache(64)
def _reader(tar: str) -> ShardReader:
    return ShardReader([open_index(Path(tar))], verify=True)


def _read(reader: ShardReader, i: int) -> Row:
    index = reader.indexes[0]
    source = f"{index.tar.name}/{index.key(i)}"
    try:
        fields = reader.fields(0, i)
        image = fields[find_image(fields)]
    except SampleError as error:
        return Row(source, fault=(error.cause, error.what))
    except FaultError as error:
        return Row(source, fault=error.fault)
    return Row(source, image, (fields.get("txt"),), meta=fields.get("json", {}))


def read_stats(folder: Path) -> dict[str, Stats]:
    """Return number -> account of the shards that img2dataset finished.

    Raises:
        DataError: a stats file is damaged.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if match := _STATS.match(path.name):
            try:
                data = json.loads(path.read_bytes())
                errors = Counter({str(name): int(n) for name, n in dict(data["status_dict"]).items()})
                found[match.group(1)] = Stats(int(data["count"]), int(data["successes"]), errors)
            except (ValueError, TypeError, KeyError) as error:
                what = "the account of an img2dataset shard is damaged"
                hint = f"remove {path.name}; the samples of its tar are taken all the same"
                raise DataError(what, where=str(path), hint=hint) from error
    return found


def describe_downloads(stats: Mapping[str, Stats], present: Sequence[str]) -> list[str]:
    """Return what a user should know: the success rate with its main errors, and the numbers that are missing."""
    notes = []
    count, successes = sum(one.num_rows for one in stats.values()), sum(one.successes for one in stats.values())
    errors = sum((one.errors for one in stats.values()), Counter[str]())
    del errors["success"]
    if count:
        main = "".join(f", {n} x {error}" for error, n in errors.most_common(_SHOWN_ERRORS))
        notes.append(f"img2dataset fetched {successes} of {count} images, {successes / count:.1%}{main}")
    unfinished = [number for number in present if number not in stats]
    if unfinished:
        notes.append(f"not finished by img2dataset, what is whole is taken: {_some(unfinished)}")
    known = {int(number): number for number in (*stats, *present)}
    width = max(map(len, known.values()), default=5)
    gaps = [str(number).zfill(width) for number in range(max(known, default=0)) if number not in known]
    if gaps:
        notes.append(f"missing numbers: {_some(gaps)}")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def open_tars(folder: Path, stats: Mapping[str, Stats]) -> tuple[TarRows, list[Lost], list[str]]:
    """Index the tars of the folder; return their rows, the rows that are lost, and the numbers of the tars.

    Raises:
        DataError: no tar holds a sample.
    """
    tars = {match.group(1): path for path in sorted(folder.glob("*.tar")) if (match := _TAR.match(path.name))}
    with ThreadPoolExecutor() as pool:  # reading and hashing run outside Python's lock
        opened = list(track(pool.map(_try_open, tars.values()), len(tars), "indexing tars"))
    lost: list[Lost] = []
    files, starts, total, has_captions = [], [], 0, False
    for (number, tar), index in zip(tars.items(), opened, strict=True):
        promised = stats[number].successes if number in stats else 0
        if isinstance(index, ShardIndex):
            files.append(str(tar))
            starts.append(total)
            total += len(index)
            has_captions |= "txt" in index.fields
            lost += _lost_of(index, tar.name, promised)
        elif promised or number not in stats:
            lost.append(_shortfall(tar.name, "damaged", index.what, max(promised, 1)))
    for number in sorted(stats.keys() - tars.keys()):
        if stats[number].successes:
            lost.append(_shortfall(f"{number}.tar", "no-image", "the tar is missing", stats[number].successes))
    if not files:
        what = lost[0]["what"] if lost else "there is no NUMBER.tar with samples"
        raise DataError("the img2dataset output contains no sample", where=str(folder), note=what)
    return TarRows(tuple(files), tuple(starts), total, has_captions), lost, list(tars)


def _try_open(tar: Path) -> ShardIndex | DataError:
    try:
        return open_index(tar)
    except DataError as error:
        return error


def _lost_of(index: ShardIndex, name: str, promised: int) -> list[Lost]:
    problems = [problem for problem in index.problems() if problem.cause in CAUSES]
    lost = [
        {"source": f"{name}/{problem.key}", "cause": problem.cause, "what": problem.detail}
        for problem in problems
        if problem.key
    ]
    missing = promised - len(index) - len(lost)
    unknown = [problem for problem in problems if not problem.key]
    if missing > 0 or unknown:
        cause = unknown[0].cause if unknown else "truncated"
        words = [problem.detail for problem in unknown]
        if promised > len(index):
            words.append(f"img2dataset counted {promised} samples, the tar contains {len(index)}")
        lost.append(_shortfall(name, cause, "; ".join(words), max(missing, 1)))
    return lost


def find_shortfalls(stats: Mapping[str, Stats], found: Mapping[str, int]) -> list[Lost]:
    """Return what is lost of the `files` form, from the number of images in each folder."""
    return [
        _shortfall(f"{number}/", "no-image", f"img2dataset counted {one.successes} images", one.successes - have)
        for number, one in sorted(stats.items())
        if (have := found.get(number, 0)) < one.successes
    ]


def _shortfall(source: str, cause: str, what: str, count: int) -> Lost:
    return {"source": source, "cause": cause, "what": what, "count": count}
