"""Reads a whole tar and groups its members into samples; everything that would be lost is reported as a `Problem`.

A scan cannot detect a change inside a member's bytes, a header replaced by another intact one, or a last sample that
was overwritten with zeros from its header on; only an earlier index reveals these. In the sample at a truncation, it
cannot detect missing fields that fewer than half of the samples have.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from data_tools.core.errors import DataError
from data_tools.tar.byte_file import ByteFile
from data_tools.tar.headers import Damage, Entry, Window, walk
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.open import open_file

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
FIELDS = (*IMAGE_FIELDS, "txt", "json", "cls")

# Problems that lose no sample; those that do are listed in `errors.CAUSES`.
NOTICES = {
    "non-adjacent": "members of a sample are not adjacent; they are joined here, but webdataset would split the sample",
    "copy": "a member is stored twice with the same bytes; one is used",
    "missing-field": "the sample lacks a field that most samples of the shard have",
    "ignored-dotted": "a dot inside a file name turns it into a field that is not read",
    "unsafe": "a pickle, a link, a device, or a path outside the archive; never opened, followed or written",
}

_NAME_RULE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset 1.0: tariterators.base_plus_ext
_META_RULE = re.compile(r"__[^/]*__($|/)")  # webdataset 1.0: tar_file_iterator(skip_meta=...)
_LINKS = (b"1", b"2", b"3", b"4", b"6")  # and devices
_IMAGE = "image"  # any of IMAGE_FIELDS
_PICKLE = "is a pickle, which runs code when it is loaded"
_PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill")
COMPRESSED = "a compressed tar cannot be read by offset"
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


class Member(NamedTuple):
    """Position of a member's bytes in the tar, and their SHA-256."""

    offset: int
    size: int
    sha256: bytes


class Problem(NamedTuple):
    """A loss (cause in `errors.CAUSES`) or a notice (cause in `NOTICES`); key "" if unknown."""

    cause: str
    offset: int
    key: str
    detail: str


class ScannedTar(NamedTuple):
    """The samples of a tar: `samples[i]` maps the fields of `keys[i]` to their members."""

    size: int
    mtime_ns: int
    keys: list[str]
    samples: list[dict[str, Member]]
    ignored: Counter[str]
    problems: list[Problem]


def scan_tar(tar: LocationLike, file: ByteFile | None = None, may_be_empty: bool = False) -> ScannedTar:
    """Read the tar once, from `file` if it is already open; return its samples and problems.

    After damage the scan continues at the next intact header, so that only the one or two damaged samples are lost.
    Members whose suffix is not in `FIELDS`, links and files without a suffix are ignored and counted by suffix.

    Raises:
        DataError: the tar is missing, compressed, unreadable, or has no sample, unless it `may_be_empty`.
    """
    location = Location(tar)
    file = file or open_file(location)
    grouping = _Grouping()
    try:
        _refuse_compressed(location, file.read(0, 8))
        for found in walk(Window(file)):
            if isinstance(found, Damage):
                grouping.add_damage(found)
            else:
                grouping.add(found)
    except OSError as error:
        hint = "copy the shard to another disk"
        raise DataError(f"the shard cannot be read: {error.strerror}", where=location, hint=hint) from error
    samples = grouping.finish()
    if not samples and not may_be_empty:
        ignored = ", ".join(f"{count} x .{suffix}" for suffix, count in grouping.ignored.most_common(5)) or "none"
        first = f"; {grouping.problems[0].detail}" if grouping.problems else ""
        raise DataError(
            f"the shard contains no sample (other files: {ignored}){first}",
            where=location,
            hint=f"a sample needs a field of: {' '.join(FIELDS)}; copy, download or create the shard again",
        )
    problems = sorted(grouping.problems, key=lambda problem: problem.offset)
    return ScannedTar(file.size, file.mtime_ns, list(samples), list(samples.values()), grouping.ignored, problems)


class _Run:
    """Adjacent members with the same key."""

    def __init__(self, key: str, offset: int):
        self.key = key
        self.offset = offset
        self.members: dict[str, Member] = {}
        self.conflict = ""  # a field that occurs twice with different bytes
        self.dotted = ""  # an ignored field such as v2.jpg
        self.near_damage = False


class _Grouping:
    """Collects members into runs, and runs into samples."""

    def __init__(self) -> None:
        self.runs: list[_Run] = []
        self.ignored: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self._after_damage = False

    def add_damage(self, damage: Damage) -> None:
        """Record the damage, and that adjacent runs may have lost members."""
        cause = "truncated" if damage.truncated else "damaged"
        detail = f"{damage.detail}: bytes {damage.offset} to {damage.stop} are lost"
        self.problems.append(Problem(cause, damage.offset, "", detail))
        if self.runs:
            run = self.runs[-1]
            run.near_damage = True
            for field in [field for field, member in run.members.items() if member.offset > damage.offset]:
                del run.members[field]  # its own header is damaged
        self._after_damage = True

    def add(self, entry: Entry) -> None:
        """Add one member to its run."""
        name = entry.name.decode("utf-8", "backslashreplace")  # keys are always valid text
        if entry.kind in (b"5", b"V") or ("__" in name and _META_RULE.match(name)):
            return
        hidden = name.startswith(".", name.rfind("/") + 1)  # such as "._a.jpg", which tar adds on macOS
        match = None if hidden else _NAME_RULE.match(name)
        key, suffix = match.groups() if match else ("", "")
        field = suffix.lower()
        unsafe = _unsafe(entry.kind, name, field)
        if unsafe:
            self.problems.append(Problem("unsafe", entry.offset, key, f"{name!r} {unsafe}"))
        if match and entry.kind == b"0" and unsafe in ("", _PICKLE):
            self._add_field(key, field, entry)
        else:
            self.ignored["(link, device or unsafe name)" if match else "(no suffix)"] += 1

    def _add_field(self, key: str, field: str, entry: Entry) -> None:
        if not self.runs or self.runs[-1].key != key:
            self.runs.append(_Run(key, entry.offset))
        run = self.runs[-1]
        run.near_damage |= self._after_damage
        self._after_damage = False
        if field not in FIELDS:
            self.ignored[field] += 1
            if field.rpartition(".")[2] in FIELDS:
                run.dotted = field
            return
        member = Member(entry.data_offset, entry.size, entry.sha256)
        if field not in run.members:
            run.members[field] = member
        elif run.members[field].sha256 == member.sha256:
            self.problems.append(Problem("copy", entry.offset, key, f".{field} is stored twice"))
        else:
            run.conflict = field

    def finish(self) -> dict[str, dict[str, Member]]:
        """Join the runs into samples, in the order of their first members."""
        samples: dict[str, dict[str, Member]] = {}
        near_damage = set()
        for run in self.runs:
            if run.near_damage:
                near_damage.add(run.key)
            if run.conflict:
                detail = f".{run.conflict} occurs twice, with different content"
                self.problems.append(Problem("double-field", run.offset, run.key, detail))
            elif not run.members:
                if run.dotted:
                    detail = f"its files end in .{run.dotted}: a key ends at the first dot of a file name"
                    self.problems.append(Problem("dotted-name", run.offset, run.key, detail))
            else:
                if run.dotted:
                    self.problems.append(Problem("ignored-dotted", run.offset, run.key, f".{run.dotted} is not read"))
                self._join(samples, run)
        self._report_missing(samples, near_damage)
        return samples

    def _join(self, samples: dict[str, dict[str, Member]], run: _Run) -> None:
        """Add a run to the samples; to an existing one of the same key only if their content does not conflict."""
        have = samples.setdefault(run.key, run.members)
        if have is run.members:
            return
        first = min(member.offset for member in have.values())
        if any(have[field].sha256 != run.members[field].sha256 for field in have.keys() & run.members.keys()):
            detail = f"a sample with the same key and different content is at byte {first}; that one is used"
            self.problems.append(Problem("double-key", run.offset, run.key, detail))
        elif run.members.keys() <= have.keys():
            self.problems.append(Problem("copy", run.offset, run.key, f"the same is at byte {first}"))
        else:
            self.problems.append(Problem("non-adjacent", run.offset, run.key, f"its other members are at byte {first}"))
            samples[run.key] = run.members | have

    def _report_missing(self, samples: dict[str, dict[str, Member]], near_damage: set[str]) -> None:
        """Report samples that lack a field most samples have; next to damage it may be lost, so they are removed."""
        kinds = {key: {_IMAGE if field in IMAGE_FIELDS else field for field in samples[key]} for key in samples}
        counts = Counter(kind for of_sample in kinds.values() for kind in of_sample)
        usual = {kind for kind, count in counts.items() if 2 * count > len(samples)}
        for key, of_sample in kinds.items():
            if missing := usual - of_sample:
                offset = min(member.offset for member in samples[key].values())
                detail = f"it has no {' '.join(sorted(missing))}"
                if key in near_damage:
                    self.problems.append(Problem("damaged", offset, key, f"{detail}, lost in the adjacent damage"))
                    del samples[key]
                else:
                    self.problems.append(Problem("missing-field", offset, key, detail))


def _unsafe(kind: bytes, name: str, field: str) -> str:
    """Return why a member is unsafe, "" if it is safe."""
    if kind in _LINKS:
        return "is a link or a device"
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        return "would be extracted outside the target folder"
    return _PICKLE if field not in FIELDS and field.rpartition(".")[2] in _PICKLES else ""


def _refuse_compressed(tar: Location, head: bytes) -> None:
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                COMPRESSED,
                where=tar,
                note="images are already compressed, so a plain tar is hardly larger",
                hint=f"{program} {tar}",
            )
