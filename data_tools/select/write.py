"""Writes selected samples of indexed shards, in any order, as new shards.

Bytes are copied unchanged and verified against their hash in the index. A sample keeps its key; if several selected
samples have the same key, the first in the order of the input keeps it and one from input shard number s (from 0) gets
`KEY-sS`. The shards are byte-identical for any number of workers, and a killed call resumes when it is repeated.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.core.errors import CAUSES, DataError, SampleError, UsageError
from data_tools.core.files import write_atomic
from data_tools.core.output_folder import check_apart, close_output, open_output
from data_tools.core.ownership import owned
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.tar.index import ShardIndex, open_index
from data_tools.tar.reader import ShardReader
from data_tools.tar.shard_names import ShardNames
from data_tools.tar.writer import ShardWriter

REJECTED = "rejected.jsonl"

Int64s = NDArray[np.int64]
Rejected = dict[str, str]  # shard, cause, key, detail


class OutputOptions(NamedTuple):
    """Output options for selected samples.

    Args:
        folder: folder of the new shards: new, empty, or left by the same call when it was killed.
        shard_size: samples per shard.
        shuffle: seed of a random order; None keeps the order of the input.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.
    """

    folder: Path
    shard_size: int = 1000
    shuffle: int | None = None
    num_workers: int | None = None
    engine: str = "local"


class WriteReport(NamedTuple):
    """Counts of what was written.

    `rejected` counts unreadable samples by cause, `renamed` the samples with a new key, `not_copied` the members of
    the input that are not part of a sample; `was_there` is True if the folder was already finished.
    """

    folder: str
    samples: int
    shards: int
    bytes: int
    rejected: dict[str, int]
    renamed: int
    not_copied: int
    was_there: bool = False

    def describe(self) -> str:
        """Return the report as text."""
        state = "already there" if self.was_there else "written"
        lines = [
            f"{self.folder}: {state}",
            f"  {self.samples} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB",
        ]
        if self.rejected:
            causes = ", ".join(f"{cause} {count}" for cause, count in self.rejected.items())
            lines.append(f"  skipped, listed in {self.folder}/{REJECTED}: {causes}")
        if self.renamed:
            lines.append(
                f"  {self.renamed} samples with duplicate keys were renamed to KEY-sN, where N is their shard number"
            )
        if self.not_copied:
            lines.append(f"  {self.not_copied} other files were not copied")
        return "\n".join(lines)


class SampleTable:
    """All samples of several shards, numbered from 0 across the shards in order.

    Args:
        indexes: indexes of the shards.
    """

    def __init__(self, indexes: Sequence[ShardIndex]):
        self.indexes = list(indexes)
        self.starts = np.cumsum([0, *(len(index) for index in indexes)])
        self.names = ShardNames([index.tar for index in indexes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, sample: int) -> tuple[int, int]:
        """Return the number of the shard and that of the sample within it."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def key(self, sample: int) -> str:
        """Return the key without the shard."""
        shard, i = self.place(sample)
        return self.indexes[shard].key(i)

    def full_key(self, sample: int) -> str:
        """Return `shard.tar/key`, with as much of the path as tells it from other shards of the same name."""
        shard, i = self.place(sample)
        return f"{self.names[shard]}/{self.indexes[shard].key(i)}"


def owned_output(options: OutputOptions | None) -> contextlib.AbstractContextManager[None]:
    """Own the output folder, if there is one, for a verb that selects samples before it writes them."""
    return contextlib.nullcontext() if options is None else owned(options.folder)


def write_samples(
    table: SampleTable, chosen: Int64s, options: OutputOptions, *, verb: str, lists: Mapping[str, Iterable[str]] = {}
) -> WriteReport:
    """Write the selected samples, `shard_size` per shard; memory is about 40 bytes per sample.

    With `shuffle`, position p has the sample chosen[argsort(draw)[p]], where draw is the first raw outputs of
    PCG64(SeedSequence((seed, 0))) and the sort is stable: a random order over all shards.

    Args:
        table: the samples.
        chosen: numbers of the selected samples, ascending.
        options: output options.
        verb: the verb that writes them, for the record in the folder.
        lists: name of a text file in the folder -> its lines.

    Raises:
        DataError: nothing is selected, or none of it can be read.
        UsageError: options are invalid, or the folder contains something else.
    """
    _check(table, chosen, options)
    plan = {
        "verb": verb,
        "input": _sha256("".join(index.header["content_sha256"] for index in table.indexes).encode()),
        "chosen": _sha256(np.ascontiguousarray(chosen, "<i8").tobytes()),
        "samples": len(chosen),
        "shard_size": options.shard_size,
        "shuffle": options.shuffle,
    }
    with owned(options.folder):
        report = open_output(options.folder, plan)
        if report is not None:
            return WriteReport(**report | {"folder": str(options.folder), "was_there": True})
        renamed = _new_keys(table, chosen)
        tasks = list(_tasks(_ordered(chosen, options.shuffle), options.shard_size, renamed))
        function = functools.partial(_write_shard, options.folder, ShardReader(table.indexes, verify=True), table)
        work = run_tasks(function, tasks, num_workers=options.num_workers, engine=options.engine)
        done = dict(track(work, len(tasks), "writing shards"))
        rejected = [*_lost_before(table), *(entry for number in range(len(tasks)) for entry in done[number].rejected)]
        written = WriteReport(
            folder=str(options.folder),
            samples=sum(shard.samples for shard in done.values()),
            shards=sum(shard.samples > 0 for shard in done.values()),
            bytes=sum(shard.bytes for shard in done.values()),
            rejected=dict(sorted(Counter(entry["cause"] for entry in rejected).items())),
            renamed=len(renamed),
            not_copied=sum(sum(index.ignored.values()) for index in table.indexes),
        )
        lines = [json.dumps(entry, ensure_ascii=False) for entry in rejected]
        for name, texts in {REJECTED: lines, **lists}.items():
            data = "".join(f"{text}\n" for text in texts).encode("utf-8", "backslashreplace")
            write_atomic(options.folder / name, data)
        if not written.samples:
            where = str(options.folder / REJECTED)
            hint = "for the reasons run: mmvit-data check SHARDS"
            raise DataError("none of the selected samples can be read", where=where, hint=hint)
        close_output(options.folder, plan, written._asdict())
        return written


def _check(table: SampleTable, chosen: Int64s, options: OutputOptions) -> None:
    if options.shard_size < 1 or (options.shuffle is not None and not 0 <= options.shuffle < 2**32):
        raise UsageError("the shard size must be at least 1 and the seed 0 .. 4294967295")
    check_apart(options.folder, (index.tar.path for index in table.indexes if not index.tar.is_remote))
    if not len(chosen):
        raise DataError("no sample is selected: nothing to write", where=str(options.folder))


class _Task(NamedTuple):
    number: int
    samples: Int64s
    new_keys: dict[int, str]


class _Written(NamedTuple):
    samples: int
    bytes: int
    rejected: list[Rejected]


def _write_shard(folder: Path, reader: ShardReader, table: SampleTable, task: _Task) -> _Written:
    tar = folder / f"shard-{task.number:05d}.tar"
    if tar.exists():  # left by a killed call, complete
        index = open_index(tar)
        if len(index) == len(task.samples):
            return _Written(len(index), index.tar_size, [])
        tar.unlink()  # written again, to find its rejected samples
    rejected: list[Rejected] = []
    with ShardWriter(folder, max_samples=len(task.samples), first_number=task.number) as writer:
        for sample in task.samples.tolist():
            shard, i = table.place(sample)
            try:
                fields = reader.fields(shard, i)
            except SampleError as error:
                rejected.append(_entry(table, shard, error.cause, error.key, error.what))
                continue
            writer.copy(task.new_keys.get(sample) or _clean(table.key(sample)), fields)
    return _Written(writer.num_samples, sum(shard.stat().st_size for shard in writer.shards), rejected)


def _tasks(order: Int64s, shard_size: int, renamed: Mapping[int, str]) -> Iterable[_Task]:
    for number, start in enumerate(range(0, len(order), shard_size)):
        samples = order[start : start + shard_size]
        yield _Task(number, samples, {sample: renamed[sample] for sample in samples.tolist() if sample in renamed})


def _ordered(chosen: Int64s, seed: int | None) -> Int64s:
    if seed is None:
        return chosen
    draw = np.random.PCG64(np.random.SeedSequence((seed, 0))).random_raw(len(chosen))
    return chosen[np.argsort(draw, kind="stable")]


def _new_keys(table: SampleTable, chosen: Int64s) -> dict[int, str]:
    """Return the new key of each selected sample whose key an earlier one has."""
    hashes = np.fromiter((hash(_clean(table.key(sample))) for sample in map(int, chosen)), np.int64, len(chosen))
    by_hash = np.sort(hashes)
    double = np.unique(by_hash[1:][by_hash[1:] == by_hash[:-1]])
    owners: dict[str, list[int]] = defaultdict(list)
    for sample in chosen[np.isin(hashes, double)].tolist():
        owners[_clean(table.key(sample))].append(sample)
    new_keys = {}
    taken: set[str] = set()
    for key, samples in owners.items():
        for sample in samples[1:]:
            new = key
            while new == key or new in taken or _contains(by_hash, hash(new)):
                new += f"-s{table.place(sample)[0]}"
            taken.add(new)
            new_keys[sample] = new
    return new_keys


def _contains(rising: Int64s, value: int) -> bool:
    place = int(np.searchsorted(rising, value))
    return place < len(rising) and int(rising[place]) == value


def _clean(key: str) -> str:
    """Return a valid key: without leading or double slashes and line breaks, which a tar can contain."""
    return re.sub(r"[\0\n]", "_", "/".join(part for part in key.split("/") if part))


def _lost_before(table: SampleTable) -> list[Rejected]:
    """Return the samples that were already lost when the shards were indexed, so are not in the indexes."""
    return [
        _entry(table, shard, problem.cause, problem.key, problem.detail)
        for shard, index in enumerate(table.indexes)
        for problem in index.problems()
        if problem.cause in CAUSES and problem.cause != "hash"  # samples with that cause are still in the index
    ]


def _entry(table: SampleTable, shard: int, cause: str, key: str, detail: str) -> Rejected:
    return {"shard": table.names[shard], "cause": cause, "key": key, "detail": detail}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
