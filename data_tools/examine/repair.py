"""Writes new shards with all intact samples of damaged ones, and lists the rest."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.core.errors import DataError, UsageError
from data_tools.core.files import write_atomic
from data_tools.core.output_folder import atomic_folder, check_apart
from data_tools.core.ownership import owned
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.examine.check import Inspection, inspect_shard
from data_tools.sample.content import read_content
from data_tools.tar.index import ShardIndex, index_path
from data_tools.tar.index_file import index_bytes
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.reader import ShardReader
from data_tools.tar.scan import IMAGE_FIELDS, Problem
from data_tools.tar.writer import ShardWriter

REJECTED = "rejected.jsonl"


class RepairedShard(NamedTuple):
    """Result of one shard: `kept` samples are in the new one (0: none was written), `left_out` are not.

    `ignored` counts by suffix the members that no sample uses, which are not copied.
    """

    shard: str
    kept: int
    left_out: list[Problem]
    ignored: Counter[str]


class RepairReport(NamedTuple):
    """Result of all shards; the new ones are in `folder`, each under its old name."""

    folder: Path
    shards: list[RepairedShard]

    @property
    def kept(self) -> int:
        """The number of samples in the new shards."""
        return sum(shard.kept for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON document."""
        causes = Counter(problem.cause for shard in self.shards for problem in shard.left_out)
        ignored = sum((shard.ignored for shard in self.shards), Counter[str]())
        return {
            "folder": str(self.folder),
            "rejected": str(self.folder / REJECTED),
            "kept": self.kept,
            "left_out": causes.total(),
            "causes": dict(sorted(causes.items())),
            "not_copied": dict(sorted(ignored.items())),
            "shards_without_a_whole_sample": [shard.shard for shard in self.shards if not shard.kept],
            "shards": [
                {"shard": shard.shard, "kept": shard.kept, "left_out": len(shard.left_out)} for shard in self.shards
            ],
        }


class _Task(NamedTuple):
    tar: Location
    out: Path


def repair_shards(
    tars: Sequence[LocationLike],
    out: str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    engine: str = "local",
) -> RepairReport:
    """Write the intact samples of each shard to a shard of the same name in the new folder `out`.

    A sample is intact if `check_shards` finds no fault in it. Its images are copied byte for byte; caption, metadata
    and label are rewritten (UTF-8 without a byte order mark, no space around). Members of other kinds than
    `tar_scan.FIELDS` are not copied. `out/rejected.jsonl` has a line for each sample that is not copied.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        out: does not exist yet, or is empty; it appears when all is written.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        UsageError: `out` is not empty or holds the shards themselves, or two shards have the same name.
        DataError: no shard contains an intact sample.
    """
    locations = [Location(tar) for tar in tars]
    names = Counter(tar.name for tar in locations)
    for name, count in names.items():
        if count > 1:
            hint = "repair each folder by itself"
            raise UsageError(f"{count} shards are named {name}, in different folders", where=name, hint=hint)
    check_apart(Path(out), (tar.path for tar in locations if not tar.is_remote))
    with owned(out, replaced=True), atomic_folder(out) as folder:
        tasks = [_Task(tar, folder) for tar in locations]
        work = run_tasks(_repair_one, tasks, num_workers=num_workers, engine=engine)
        done = dict(track(work, len(tars), "repairing"))
        shards = [done[number] for number in range(len(tars))]
        report = RepairReport(Path(out), shards)
        if not report.kept:
            raise DataError(
                "no shard contains an intact sample",
                where=locations[0],
                hint="for the reasons run: mmvit-data check SHARDS",
            )
        lines = [
            json.dumps({"shard": shard.shard, **problem._asdict()}, ensure_ascii=False) + "\n"
            for shard in shards
            for problem in shard.left_out
        ]
        write_atomic(folder / REJECTED, "".join(lines).encode("utf-8", "backslashreplace"))
    return report


def describe(report: RepairReport) -> str:
    """Return the report as text."""
    counts = report.to_json()
    lines = [f"{shard.shard}: no intact sample, no shard was written" for shard in report.shards if not shard.kept]
    written = len(report.shards) - len(lines)
    lines.append(f"{report.folder}: {counts['kept']} samples in {written} shards")
    causes = ", ".join(f"{cause} {count}" for cause, count in counts["causes"].items())
    listed = f" ({causes}), listed in {counts['rejected']}" if causes else ""
    lines.append(f"rejected: {counts['left_out']}{listed}")
    if counts["not_copied"]:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in counts["not_copied"].items())
        lines.append(f"members of other kinds, not copied: {kinds}")
    return "\n".join(lines)


def _repair_one(task: _Task) -> RepairedShard:
    inspection = inspect_shard(task.tar)
    report, scan = inspection.report, inspection.scan
    if scan is None:
        return RepairedShard(report.shard, 0, report.faults, Counter())
    kept = report.samples - report.bad
    if kept:
        _write_whole(task, inspection, kept)
    return RepairedShard(report.shard, kept, report.faults, scan.ignored)


def _write_whole(task: _Task, inspection: Inspection, kept: int) -> None:
    """Write the samples without a fault as the only shard of a temporary folder, then move it to its name."""
    assert inspection.scan is not None
    index = ShardIndex(task.tar, index_bytes(inspection.scan))
    reader = ShardReader([index], verify=True)  # what was examined is what is written
    final = task.out / task.tar.name
    own = final.with_name(f".{final.name}")
    with ShardWriter(own, max_samples=kept) as writer:
        for i in range(len(index)):
            if i in inspection.bad:
                continue
            stored = reader.fields(0, i)
            content = read_content(stored)
            fields: dict[str, object] = {field: stored[field] for field in IMAGE_FIELDS if stored.get(field)}
            read = {"txt": content.caption, "json": content.meta, "cls": content.label}
            fields |= {field: value for field, value in read.items() if value is not None}
            try:
                writer.write(index.key(i), fields)
            except DataError:  # a key that a tar can hold and that would not read back: "folder/.jpg", a line break
                writer.write(f"{re.sub('[^A-Za-z0-9_-]+', '_', index.key(i))}-{i}", fields)
    index_path(writer.shards[0]).replace(index_path(final))
    writer.shards[0].replace(final)
    own.rmdir()
