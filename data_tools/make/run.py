"""Turns images with their texts or classes into shards, in parallel, and accounts for each row of the source.

The folder that is made:

    shard-00000.tar, shard-00000.tar.idx, ...   row i of the order is key "%09d" % i; a rejected row leaves a gap
    classnames.txt                              line i names class i, where classes have names
    rejected.jsonl                              one line a row that gave no sample: row, key, source, cause, what
    shards.json                                 the source, the options and the counts
    .make/                                      a record of each finished shard while the work is not finished

Equal sources and options give equal bytes, whatever the number of workers (an index also records its tar's time).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.core.errors import CAUSES, DataError, UsageError
from data_tools.core.files import fsync_file, rename_synced, temporary_name, write_atomic
from data_tools.core.folders import describe_skipped
from data_tools.core.output_folder import close_output, open_output
from data_tools.core.ownership import owned
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.make.guess import command, tables_near
from data_tools.make.options import KINDS, MakeOptions, check_options
from data_tools.make.recipe import fitting_recipe
from data_tools.make.row import (
    EXTRA_FORMATS,
    Folders,
    SampleRules,
)
from data_tools.make.shard import (
    WORK,
    Settings,
    ShardJob,
    ShardRecord,
    group_shards,
    order_rows,
    plan_shards,
    read_record,
    record_path,
    write_shards,
)
from data_tools.make.sources import ListedRows, Source, open_source
from data_tools.make.tables import CAPTION_NAMES
from data_tools.sample.decode import FORMATS

REJECTED = "rejected.jsonl"
CLASS_NAMES = "classnames.txt"


@dataclass
class MakeReport:
    """What lies in the folder now: `rejected` counts rows by cause, `left_aside` files that give no row by suffix.

    `seconds` and `num_made` count this run only; 0 if the folder was already finished.
    """

    folder: str
    kind: str
    num_rows: int
    num_samples: int = 0
    num_shards: int = 0
    num_classes: int = 0
    tar_bytes: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    first_rejected: str = ""
    left_aside: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_made: int = 0
    seconds: float = 0.0

    @property
    def num_rejected(self) -> int:
        """Rows that gave no sample."""
        return sum(self.rejected.values())


def make_shards(
    source: Path,
    out: Path,
    options: MakeOptions,
    *,
    num_workers: int | None = None,
    engine: str = "local",
    max_bad: float = 1.0,
) -> MakeReport:
    """Write the shards of a source into the folder `out`; a killed run resumes.

    Each image is decoded once (about 1 ms for a JPEG of 500 px), so that broken ones are rejected here and not in
    training; its bytes are kept unchanged unless the options ask for another size or format.

    Args:
        source: file or folder, see `KINDS`.
        out: folder for the shards; new, empty, or of an earlier run with the same source and options.
        options: what to make.
        num_workers: processes; None takes one a core.
        engine: "local" or "ray", see `data_tools.core.workers.run_tasks`.
        max_bad: fraction of the rows that may be rejected; with more, or without a sample, the folder is not marked as
            finished, and the next call makes the shards with rejected rows again (see `check_rejected`).

    Raises:
        UsageError: bad options, or `out` holds something else.
        DataError: the source is damaged, or holds no image.
    """
    check_options(options)
    folder, source, out = str(out), source.absolute(), out.absolute()
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UsageError("the output folder is inside the source", where=folder, hint="choose a folder next to it")
    with owned(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as planning:
        opened = open_source(source, options, Path(planning, "rows.jsonl"))
        rules, seed = _rules(opened, options, source), _seed(opened, options)
        _say(opened, seed, rules)
        plan = _plan(source, opened, options, rules)
        there = open_output(out, plan)
        if there is not None:
            return MakeReport(folder, **there)
        (out / WORK).mkdir(exist_ok=True)
        if isinstance(opened.rows, ListedRows):
            opened.rows = opened.rows.moved_to(out / WORK)  # so that a killed run leaves nothing next to the folder
        start = time.monotonic()
        jobs = plan_shards(order_rows(opened.rows.num_rows, seed), options.shard_size)
        _forget_rejected(out, jobs, max_bad * opened.rows.num_rows)
        waiting = [job for job in jobs if read_record(out, job.number) is None]
        tasks = list(group_shards(waiting, opened.group_rows, options.shard_size))
        write = functools.partial(write_shards, Settings(out, opened.rows, rules))
        results = run_tasks(write, tasks, num_workers=num_workers, engine=engine)
        made = sum(num_samples for _, num_samples in track(results, len(tasks), "shards"))
        report = _finish(out, opened, rules, len(jobs))
        if _is_success(report, max_bad):
            close_output(out, plan, {name: value for name, value in vars(report).items() if name != "folder"})
            shutil.rmtree(out / WORK)
    report.folder, report.num_made, report.seconds = folder, made, time.monotonic() - start
    return report


def check_rejected(report: MakeReport, max_bad: float) -> None:
    """Raise DataError where more than the share `max_bad` of the rows was rejected."""
    if _is_success(report, max_bad):
        return
    causes = ", ".join(f"{count} x {cause}" for cause, count in report.rejected.items())
    if not report.num_samples:
        raise DataError(
            f"none of {report.num_rows} rows could be converted to a sample: {causes}",
            where=f"{report.folder}/{REJECTED}; the first: {report.first_rejected}",
            hint=f"fix the images and run again; for a fixed table or other options: rm -r {report.folder}",
        )
    raise DataError(
        f"{report.num_rejected} of {report.num_rows} rows were rejected, "
        f"{report.num_rejected / report.num_rows:.1%} (--max-bad allows {max_bad:.1%}): {causes}",
        where=f"{report.folder}/{REJECTED}; the first: {report.first_rejected}",
        note=f"the shards contain the other {report.num_samples} samples, but are not marked as finished",
        hint=f"fix the images and run again (a fixed table: into a new folder), or accept the loss: the same command "
        f"with --max-bad {report.num_rejected / report.num_rows + 0.0005:.3f}",
    )


def _is_success(report: MakeReport, max_bad: float) -> bool:
    return report.num_rejected <= max_bad * report.num_rows and report.num_samples > 0


def _forget_rejected(out: Path, jobs: Sequence[ShardJob], allowed: float) -> None:
    """Remove the records of shards with rejected rows where all shards are written and too many rows were rejected."""
    records = {job.number: record for job in jobs if (record := read_record(out, job.number)) is not None}
    num_rejected = sum(len(record.rejected) for record in records.values())
    if len(records) == len(jobs) and (num_rejected > allowed or not any(r.num_samples for r in records.values())):
        for number, record in records.items():
            if record.rejected:
                record_path(out, number).unlink()


def _rules(source: Source, options: MakeOptions, path: Path) -> SampleRules:
    classes, template = source.classes, options.template
    if options.classnames is not None:
        classes = _read_names(options.classnames)
    if source.labels is None and (template is not None or options.classnames is not None):
        raise UsageError("--template and --classnames need labels", where=str(path), hint="--label-column NAME")
    if template is not None and not classes:
        what = "the labels are numbers, and the classes have no names for the template"
        raise UsageError(what, where=str(path), hint="--classnames FILE, with one class name per line")
    if template is None and source.kind == "classes":
        template = "{}"
    with_captions = options.captions and (template is not None or source.has_captions)
    if options.captions and not with_captions and source.labels is None:
        what = "no image has a .txt or .json of the same name"
        near = [command(table) for table in tables_near(path)[:3]] if path.is_dir() else []
        hint = "for images without captions: --no-captions; if each folder is a class: --kind classes; if a table "
        hint += "contains the captions: " + ("; ".join(near) or command(path / "TABLE.csv"))
        raise UsageError(what, where=str(path), hint=hint)
    inside = options.image_root or source.start
    is_folder = source.kind in ("folder", "classes", "img2dataset")
    return SampleRules(
        folders=Folders(source.start if is_folder else inside.absolute(), inside.resolve()),
        caption_names=CAPTION_NAMES,
        with_captions=with_captions,
        labels=source.labels,
        classes=classes,
        template=template if options.captions else None,
        resize=options.resize,
        image_format=options.image_format,
        quality=options.quality,
        formats=(*FORMATS, *(EXTRA_FORMATS[name] for name in options.allow_formats)),
    )


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the class names cannot be read: {error}", where=str(path)) from error
    if not names or len(set(names)) != len(names) or not all(names):
        raise UsageError("class names must be unique and not empty, one per line", where=str(path))
    return names


def _seed(source: Source, options: MakeOptions) -> int | None:
    if source.group_rows is not None:
        if options.shuffle is not None:
            raise UsageError(
                "the rows of parquet files with embedded images can only be read in order",
                hint="omit --shuffle, then shuffle the shards: mmvit-data reshard",
            )
        return None
    if options.in_order or (options.shuffle is None and source.labels is None):
        return None
    return options.shuffle or 0


def _say(source: Source, seed: int | None, rules: SampleRules) -> None:
    """Log what was found and selected before the conversion starts."""
    notes = [f"{source.kind}: {KINDS[source.kind]}; {source.rows.num_rows} rows", *source.notes]
    if source.labels is not None:
        notes.append(f"labels: {len(rules.classes)} classes" if rules.classes else "labels: numbers without names")
    if seed is not None:
        notes.append(f"order: shuffled with seed {seed}; rows sorted by class train badly (--in-order keeps the order)")
    elif source.labels is not None:
        notes.append("order: that of the source; if it is sorted by class, shuffle the shards: mmvit-data reshard")
    if skipped := describe_skipped(source.aside):
        notes.append(skipped)
    for note in notes:
        print(note, file=sys.stderr, flush=True)


def _plan(path: Path, source: Source, options: MakeOptions, rules: SampleRules) -> dict[str, Any]:
    return {
        **json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "verb": "make",
        "source": str(path),
        "source_content": source.fingerprint,
        "class_names": hashlib.sha256("\n".join(rules.classes).encode("utf-8", "replace")).hexdigest(),
    }


def _finish(out: Path, source: Source, rules: SampleRules, num_shards: int) -> MakeReport:
    """Write `classnames.txt` and, from the records of all shards, `rejected.jsonl`; return the report."""
    if rules.classes:
        write_atomic(out / CLASS_NAMES, "".join(f"{name}\n" for name in rules.classes).encode("utf-8", "replace"))
    report = MakeReport(str(out), source.kind, source.rows.num_rows, num_classes=len(rules.classes), notes=source.notes)
    report.num_rows += sum(entry.get("count", 1) for entry in source.lost)
    report.left_aside = dict(source.aside.most_common())
    causes = Counter[str]()
    temporary = temporary_name(out / REJECTED)
    with temporary.open("w", encoding="ascii") as file:
        for number in range(-1, num_shards):
            record = ShardRecord(0, 0, source.lost) if number < 0 else read_record(out, number)
            assert record is not None, number
            report.num_samples += record.num_samples
            report.num_shards += record.num_samples > 0
            report.tar_bytes += record.tar_bytes
            for entry in record.rejected:
                report.first_rejected = report.first_rejected or f"{entry['source']}: {entry['what']}"
                causes[entry["cause"]] += entry.get("count", 1)
                file.write(json.dumps(entry) + "\n")
    fsync_file(temporary)
    rename_synced(temporary, out / REJECTED)
    report.rejected = dict(causes.most_common())
    return report


def describe(report: MakeReport) -> str:
    """Return the report as text."""
    lines = [
        f"{report.folder}: {report.num_samples} samples in {report.num_shards} shards, {report.tar_bytes / 1e6:.1f} MB"
        + (f", {report.num_classes} classes in {CLASS_NAMES}" if report.num_classes else "")
    ]
    if report.seconds:
        rate = report.num_made / report.seconds
        lines.append(f"made {report.num_made} samples in {report.seconds:.1f} s, {rate:.0f} samples/s")
    else:
        lines.append("all of it was there already")
    if report.rejected:
        causes = ", ".join(f"{count} x {cause} ({CAUSES[cause]})" for cause, count in report.rejected.items())
        lines.append(f"rejected {report.num_rejected} of {report.num_rows} rows: {causes}")
        lines.append(f"reasons: {report.folder}/{REJECTED}; the first: {report.first_rejected}")
    if report.num_samples:
        lines.append(f"next: mmvit-data stats {report.folder}")
        if recipe := fitting_recipe(report.num_samples):
            name, *settings = recipe
            lines.append(f"      mmvit pretrain {name} data.train={report.folder} {' '.join(settings)}")
        if report.num_classes:
            classes = f"classes={report.folder}/{CLASS_NAMES}"
            lines.append(f"      mmvit finetune CONFIG data.train={report.folder} {classes} --dry-run")
    return "\n".join(lines)
