"""Write the shards of a job, a few per task, with a record of each shard so that a killed job can resume."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.core.files import write_atomic
from data_tools.make.row import Row, SampleRules, sample_fields
from data_tools.make.sources import RowSource
from data_tools.sample.content import FaultError
from data_tools.tar.index import index_path
from data_tools.tar.writer import ShardWriter

WORK = ".make"  # folder of the records


class ShardJob(NamedTuple):
    """A shard to write: its number, the position of its first row in the order, and the numbers of its rows."""

    number: int
    position: int
    rows: np.ndarray[Any, Any]


class Settings(NamedTuple):
    """What all shards of a job share."""

    folder: Path
    rows: RowSource
    rules: SampleRules


class ShardRecord(NamedTuple):
    """What became of a shard's rows; a shard of which all rows were rejected has no tar."""

    num_samples: int
    tar_bytes: int
    rejected: list[dict[str, Any]]  # as in `rejected.jsonl`


def order_rows(num_rows: int, seed: int | None) -> np.ndarray[Any, Any]:
    """Return the numbers of all rows in their order: shuffled, or the source's where the seed is None."""
    if seed is None:
        return np.arange(num_rows)
    # Raw numbers and a stable sort: the same with every version of numpy.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(num_rows), kind="stable")


def plan_shards(order: np.ndarray[Any, Any], size: int) -> list[ShardJob]:
    """Cut the order into shards of `size` rows."""
    return [ShardJob(i, start, order[start : start + size]) for i, start in enumerate(range(0, len(order), size))]


def group_shards(jobs: Sequence[ShardJob], group_rows: int | None, size: int) -> Iterator[tuple[ShardJob, ...]]:
    """Yield the shards of each piece of work: one, or neighbours where rows can only be read from their group's start.

    An eighth of a group each: reading over a row takes about a thirtieth of the time that making its sample takes.
    """
    most = 1 if group_rows is None else -(-group_rows // (8 * size))
    run: list[ShardJob] = []
    for job in jobs:
        if run and (len(run) == most or job.number != run[-1].number + 1):
            yield tuple(run)
            run = []
        run.append(job)
    if run:
        yield tuple(run)


def write_shards(settings: Settings, shards: Sequence[ShardJob]) -> int:
    """Write neighbouring shards, whose rows are read in one go, and their records; return the number of samples."""
    rows = settings.rows.rows(np.concatenate([shard.rows for shard in shards]).tolist())
    return sum(_write_shard(settings, shard, itertools.islice(rows, len(shard.rows))) for shard in shards)


def _write_shard(settings: Settings, shard: ShardJob, rows: Iterator[Row]) -> int:
    tar = _tar(settings.folder, shard.number)
    for left in (tar, index_path(tar)):  # of a run that was killed before it wrote the record
        left.unlink(missing_ok=True)
    rejected = []
    with ShardWriter(settings.folder, max_samples=len(shard.rows), first_number=shard.number) as writer:
        for i, (number, row) in enumerate(zip(shard.rows.tolist(), rows, strict=True)):
            key = f"{shard.position + i:09d}"
            try:
                writer.write(key, sample_fields(row, settings.rules))
            except FaultError as error:
                cause, what = error.fault
                entry = {"row": number, "key": key, "source": row.source, "cause": cause, "what": what}
                rejected.append(entry)
    record = ShardRecord(writer.num_samples, tar.stat().st_size if writer.shards else 0, rejected)
    write_atomic(record_path(settings.folder, shard.number), json.dumps(record._asdict()).encode())
    return writer.num_samples


def _tar(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.tar"


def record_path(folder: Path, number: int) -> Path:
    """Return the path of the record of a shard."""
    return folder / WORK / f"shard-{number:05d}.json"


def read_record(folder: Path, number: int) -> ShardRecord | None:
    """Return the record of a shard that is finished and still there; None for one that is to be made."""
    try:
        record = ShardRecord(**json.loads(record_path(folder, number).read_bytes()))
        is_there = not record.num_samples or _tar(folder, number).stat().st_size == record.tar_bytes
    except (OSError, ValueError, TypeError):
        return None
    return record if is_there else None
