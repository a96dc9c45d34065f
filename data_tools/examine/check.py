"""Examines shards: reads every byte again, compares it with the index, decodes every image, reads every caption."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.core.errors import CheckpointError, DataError, SampleError
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.sample.content import Fault, read_content
from data_tools.tar.byte_file import ByteFile
from data_tools.tar.index import ShardIndex, index_path
from data_tools.tar.index_file import index_bytes
from data_tools.tar.location import Location, LocationLike, without_secrets
from data_tools.tar.open import open_file
from data_tools.tar.reader import ShardReader
from data_tools.tar.scan import COMPRESSED, NOTICES, Member, Problem, ScannedTar, scan_tar

_NUMBERED = re.compile(r"^(.*?)(\d+)(\.tar)$")
_TORN = ("damaged", "truncated", "hash")  # what another copy of the shard may not have
_MAX_ROWS = 40
_MAX_OF_A_CAUSE = 3
_MAX_LISTED = 30


class ShardReport(NamedTuple):
    """What a check found in one shard.

    Args:
        shard: path or URL.
        samples: in the tar, the bad ones too; 0 where it cannot be read at all.
        bad: how many of these cannot be delivered.
        problems: all that is wrong or noteworthy, in the order of the tar.
        index_state: "none", "equal", "differs" (the samples are not those that were indexed) or "damaged".
    """

    shard: str
    samples: int
    bad: int
    problems: list[Problem]
    index_state: str

    @property
    def faults(self) -> list[Problem]:
        """The problems by which samples are lost."""
        return [problem for problem in self.problems if problem.cause not in NOTICES]

    @property
    def is_damaged(self) -> bool:
        """Whether samples are lost or cannot be trusted."""
        return bool(self.faults) or self.index_state == "damaged"


class CheckReport(NamedTuple):
    """What a check found: one report a shard, and what is noteworthy about them together."""

    shards: list[ShardReport]
    notices: list[str]

    @property
    def is_damaged(self) -> bool:
        """Whether any shard is damaged."""
        return any(shard.is_damaged for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON document."""
        shards = [
            {
                "shard": shard.shard,
                "samples": shard.samples,
                "bad_samples": shard.bad,
                "index": shard.index_state,
                "causes": _count(shard.faults),
                "first_bad_byte": shard.faults[0].offset if shard.faults else None,
                "problems": [problem._asdict() for problem in shard.problems],
            }
            for shard in self.shards
        ]
        samples = sum(shard.samples for shard in self.shards)
        causes = _count(problem for shard in self.shards for problem in shard.faults)
        total = {"damaged": self.is_damaged, "samples": samples, "causes": causes}
        return {**total, "shards": shards, "notices": self.notices}


class Inspection(NamedTuple):
    """A shard's report, the scan it was made from (None if unreadable), and the numbers of the bad samples in it."""

    report: ShardReport
    scan: ScannedTar | None
    bad: frozenset[int]


class _Task(NamedTuple):
    tar: Location
    decode: bool


def check_shards(
    tars: Sequence[LocationLike], *, decode: bool = True, num_workers: int | None = None, engine: str = "local"
) -> CheckReport:
    """Examine shards; nothing is written, and a shard that cannot be read is part of the report.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        decode: decode every image; False reads the images' headers only.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.
    """
    locations = [Location(tar) for tar in tars]
    done = run_tasks(_check_one, [_Task(tar, decode) for tar in locations], num_workers=num_workers, engine=engine)
    reports = dict(track(done, len(tars), "checking shards"))
    shards = [reports[number] for number in range(len(tars))]
    return CheckReport(shards, [*_told_once(shards), *_gaps(locations), *_counted_otherwise(locations, shards)])


def inspect_shard(tar: Location, decode: bool = True) -> Inspection:
    """Examine one shard: its structure, its members against the index next to it, and what they hold."""
    try:
        scan = scan_tar(tar)
    except DataError as error:
        state = _index_state(tar).replace("equal", "differs")
        detail = f"{error.what}; {error.hint}"
        report = ShardReport(str(tar), 0, 0, [Problem("damaged", 0, "", detail)], state)
        return Inspection(report, None, frozenset())
    state, scan, changed = _compare(tar, scan)
    numbers = {key: i for i, key in enumerate(scan.keys)}
    bad = dict(_bad_contents(tar, scan, decode))
    bad |= {numbers[problem.key]: problem for problem in changed if problem.key in numbers}
    reported = {problem.key for problem in scan.problems if problem.cause not in NOTICES and problem.key}
    gone = [problem for problem in changed if problem.key not in numbers.keys() | reported]
    problems = sorted([*scan.problems, *gone, *bad.values()], key=lambda problem: problem.offset)
    report = ShardReport(str(tar), len(scan.keys), len(bad), problems, state)
    return Inspection(report, scan, frozenset(bad))


def _check_one(task: _Task) -> ShardReport:
    return inspect_shard(task.tar, task.decode).report


def _index_state(tar: Location) -> str:
    """Return "none", "damaged" (or of another version) or, where it can be read, "equal"."""
    path = index_path(tar)
    if not path.exists():
        return "none"
    try:
        ShardIndex(tar).scanned()
    except CheckpointError:
        return "damaged"
    return "equal"


def _compare(tar: Location, scan: ScannedTar) -> tuple[str, ScannedTar, list[Problem]]:
    """Compare the scan with the index.

    Returns the state of the index, the scan with the samples that only the index still finds (their headers are gone,
    their bytes are as they were), and the samples that are not as they were when the tar was indexed.
    """
    state = _index_state(tar)
    if state != "equal":
        return state, scan, []
    index, file = ShardIndex(tar).scanned(), open_file(tar)
    found = dict(zip(scan.keys, scan.samples, strict=True))
    samples: dict[str, dict[str, Member]] = {}
    changed, saved = [], []
    for key, sample in zip(index.keys, index.samples, strict=True):
        now = found.get(key, {})
        unseen = {name: member for name, member in sample.items() if name not in now or now[name][2] != member.sha256}
        lost = [f".{name}" for name, member in unseen.items() if not _is_there(file, member)]
        if lost:
            what = f"{' '.join(lost)}: not as it was when the tar was indexed" if now else "gone since it was indexed"
            changed.append(Problem("hash", min(member.offset for member in sample.values()), key, what))
        elif unseen:
            saved.append(Problem("damaged", min(member.offset for member in unseen.values()), key, ""))
        if now or not lost:
            samples[key] = now if lost else now | unseen
    if index.keys and len(changed) == len(index.keys):
        detail = f"not the tar that was indexed: all of its {len(changed)} samples are gone or differ"
        return "differs", scan, [Problem("hash", 0, "", detail)]
    saved_keys = {problem.key for problem in saved}
    problems = [problem for problem in scan.problems if problem.key not in saved_keys or problem.cause in NOTICES]
    if saved and not any(problem.cause not in NOTICES for problem in problems):
        detail = f"headers are damaged: only the index still finds {len(saved)} samples"
        problems.append(Problem("damaged", saved[0].offset, "", detail))
    samples |= {key: sample for key, sample in found.items() if key not in samples}
    merged = scan._replace(keys=list(samples), samples=list(samples.values()), problems=problems)
    return "differs" if changed or saved else "equal", merged, changed


def _is_there(file: ByteFile, member: Member) -> bool:
    """Return whether a member's bytes are still where the index has them."""
    return hashlib.sha256(file.read(member.offset, member.size)).digest() == member.sha256


def _bad_contents(tar: Location, scan: ScannedTar, decode: bool) -> Iterator[tuple[int, Problem]]:
    index = ShardIndex(tar, index_bytes(scan))
    reader = ShardReader([index])
    for i, sample in enumerate(scan.samples):
        try:
            fault = read_content(reader.fields(0, i), index.fields, decode).fault
        except SampleError as error:
            fault = Fault(error.cause, error.what)
        if fault is not None:
            offset = min(member.offset for member in sample.values())
            yield i, Problem(fault.cause, offset, scan.keys[i], fault.detail)


def _told_once(shards: Sequence[ShardReport]) -> Iterator[str]:
    """Yield a sentence for each kind of notice: its count and its meaning."""
    found = [(problem.cause, shard.shard) for shard in shards for problem in shard.problems if problem.cause in NOTICES]
    for cause, count in Counter(cause for cause, _ in found).items():
        names = list(dict.fromkeys(Path(shard).name for other, shard in found if other == cause))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{cause}, {count} x in {names[0]}{more}: {NOTICES[cause]}"


def _gaps(tars: Sequence[Location]) -> Iterator[str]:
    """Yield the numbers that are missing between the shards' names, as in 00000, 00001, 00003."""
    numbers: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for tar in tars:
        match = _NUMBERED.match(tar.name)
        if match is not None:
            numbers[match[1], len(match[2])].append(int(match[2]))
    for (prefix, width), found in numbers.items():
        found.sort()
        for before, after in itertools.pairwise(found):
            if after > before + 1:
                first, last = f"{before + 1:0{width}}", f"{after - 1:0{width}}"
                name = first if first == last else f"{{{first}..{last}}}"
                yield f"missing: {prefix}{name}.tar; {prefix}{before:0{width}} and {prefix}{after:0{width}} are there"


def _counted_otherwise(tars: Sequence[Location], shards: Sequence[ShardReport]) -> Iterator[str]:
    """Yield a sentence for each shard whose `NAME_stats.json` of img2dataset has another number of samples."""
    for tar, shard in zip(tars, shards, strict=True):
        stats = None if tar.is_remote else tar.path.with_name(f"{tar.path.stem}_stats.json")
        if stats is None or not stats.is_file():
            continue
        try:
            successes = json.loads(stats.read_bytes())["successes"]
        except (ValueError, TypeError, KeyError):
            yield f"{stats.name} cannot be read"
            continue
        if successes != shard.samples:
            yield f"{stats.name} of img2dataset counts {successes} samples, {tar.name} has {shard.samples}"


def describe(report: CheckReport, spec: Sequence[str]) -> str:
    """Return the report as text: a row per shard (of many, only the damaged ones), faults, notices, a hint.

    Args:
        report: of `check_shards`.
        spec: the shards as the user named them, for the command that repairs.
    """
    damaged = [shard for shard in report.shards if shard.is_damaged]
    listed = report.shards if len(report.shards) <= _MAX_ROWS else damaged
    rows = [("shard", "samples", "bad", "first byte", "index", "faults")]
    for shard in listed:
        causes = ", ".join(f"{cause} {count}" for cause, count in _count(shard.faults).items())
        first = str(shard.faults[0].offset) if shard.faults else "-"
        numbers = (str(shard.samples), str(shard.bad), first)
        rows.append((Path(shard.shard).name, *numbers, shard.index_state, causes or "-"))
    lines = _aligned(rows) if listed else []
    if len(listed) < len(report.shards):
        lines.append(f"({len(report.shards) - len(listed)} more shards, intact)")
    faults = [line for shard in damaged for line in _some_faults(shard)]
    lines += ["", *faults[:_MAX_LISTED]] if faults else []
    if len(faults) > _MAX_LISTED:
        lines.append(f"({len(faults) - _MAX_LISTED} more lines; --json has all)")
    lines += ["", *(f"notice: {notice}" for notice in report.notices)] if report.notices else []
    samples = sum(shard.samples for shard in report.shards)
    bad = sum(shard.bad for shard in report.shards)
    lines += ["", f"shards: {len(report.shards)}, with faults: {len(damaged)}; samples: {samples}, bad: {bad}"]
    if damaged:
        torn = [fault.detail for shard in damaged for fault in shard.faults if fault.cause in _TORN]
        packed = [detail for detail in torn if detail.startswith(COMPRESSED)]
        hints = ["copy or download the shards again"] if len(torn) > len(packed) else []
        hints += ["unpack the compressed shards as shown above"] if packed else []
        hints += [f"write the intact samples: {_repair(spec)}"] if samples > bad else []
        lines.append(f"hint: {', or '.join(hints)}")
    if any(shard.index_state in ("differs", "damaged") for shard in damaged):
        rebuild = shlex.join(["mmvit-data", "index", "--rebuild", *map(without_secrets, spec)])
        lines.append(f"      if the shards were changed on purpose: {rebuild}")
    return "\n".join(lines)


def _repair(spec: Sequence[str]) -> str:
    return shlex.join(["mmvit-data", "repair", *map(without_secrets, spec), "--out", "NEW_FOLDER"])


def _some_faults(shard: ShardReport) -> Iterator[str]:
    """Yield the first faults of each cause of a shard."""
    name = Path(shard.shard).name
    for cause, count in _count(shard.faults).items():
        for fault in [fault for fault in shard.faults if fault.cause == cause][:_MAX_OF_A_CAUSE]:
            key = f", key {fault.key!r}" if fault.key else ""
            yield f"{name}, byte {fault.offset}{key}: {cause}: {fault.detail}"
        if count > _MAX_OF_A_CAUSE:
            yield f"{name}: {count - _MAX_OF_A_CAUSE} more of the cause {cause}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows with columns of equal width; numbers are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in (1, 2, 3) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _count(problems: Iterable[Problem]) -> dict[str, int]:
    return dict(sorted(Counter(problem.cause for problem in problems).items()))
