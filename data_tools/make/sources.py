"""What a source of images is: its kind, and its rows in a form that any process can read by number."""

from __future__ import annotations

import array
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_tools.core.errors import DataError, UsageError
from data_tools.core.folders import SPLITS
from data_tools.make import csv_rows, img2dataset, tables
from data_tools.make.folder_rows import Tally, image_rows, kind_of_images
from data_tools.make.options import KINDS
from data_tools.make.row import Row, as_index
from data_tools.make.tables import ColumnChoice

_BY_SUFFIX = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_MAX_CLASSES = 1_000_000


class RowSource(Protocol):
    """Rows by number; small, and can be sent to other processes."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        ...

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of these numbers, in this order."""
        ...


@dataclass
class Source:
    """A source that was looked through once.

    Args:
        kind: one of `KINDS`.
        rows: its rows.
        start: the folder that paths of images are relative to.
        fingerprint: differs where the rows differ.
        group_rows: rows that are best read together; None if rows are read one by one.
        has_captions: rows may have captions.
        labels: "names" or "numbers"; None where rows have no label.
        classes: class names in the order of their indexes; empty where they are not known.
        notes: what a user should know of the source.
        aside: files that give no row, by what they are.
        lost: rows that the source itself reports as missing, as written to `rejected.jsonl`.
    """

    kind: str
    rows: RowSource
    start: Path
    fingerprint: str
    group_rows: int | None = None
    has_captions: bool = True
    labels: str | None = None
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)
    lost: list[dict[str, Any]] = field(default_factory=list)


class ListedRows(NamedTuple):
    """Rows as JSON lines in a file; their byte offsets are in a numpy file next to it."""

    path: str
    num_rows: int

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of these numbers."""
        offsets = np.load(f"{self.path}.npy", mmap_mode="r")
        with Path(self.path).open("rb") as file:
            for number in numbers:
                file.seek(int(offsets[number]))
                yield Row(*json.loads(file.readline()))

    def moved_to(self, folder: Path) -> ListedRows:
        """Move the files into a folder of the same disk."""
        moved = folder / Path(self.path).name
        for suffix in ("", ".npy"):
            Path(f"{self.path}{suffix}").replace(f"{moved}{suffix}")
        return self._replace(path=str(moved))


class _Listed(NamedTuple):
    rows: ListedRows
    fingerprint: str
    labels: set[Any]


def _list_rows(rows: Iterable[Row], path: Path) -> _Listed:
    """Write rows to `path`, from where the workers read those of their shard: memory holds none of them."""
    offsets, position = array.array("q"), 0
    digest = hashlib.sha256()
    labels: set[Any] = set()
    with path.open("wb") as file:
        for row in rows:
            try:
                line = json.dumps(row, default=str).encode() + b"\n"
            except RecursionError:
                row = Row(row.source, fault=("bad-json", "the metadata is nested too deeply"))
                line = json.dumps(row).encode() + b"\n"
            file.write(line)
            digest.update(line)
            offsets.append(position)
            position += len(line)
            _add_label(labels, row.label)
    np.save(f"{path}.npy", np.frombuffer(offsets, "<i8"))
    return _Listed(ListedRows(str(path), len(offsets)), digest.hexdigest(), labels)


def _add_label(labels: set[Any], label: Any) -> None:
    if label not in (None, "") and label == label:  # NaN means a missing number
        labels.add(label if isinstance(label, int | float) else str(label))
        if len(labels) > _MAX_CLASSES:
            hint = "name another column with --label-column, or none with --label-column ''"
            raise UsageError(f"the label column has more than {_MAX_CLASSES} different values", hint=hint)


def open_source(path: Path, kind: str | None, choice: ColumnChoice, listing: Path) -> Source:
    """Look through a source.

    Args:
        path: file or folder.
        kind: one of `KINDS`; None finds it out.
        choice: of the columns of a table.
        listing: file to write the list of the rows to, where the source itself does not hold them.

    Raises:
        UsageError: the source is none of `KINDS`, or its columns are not known.
        DataError: the source is damaged or empty.
    """
    is_pattern = not path.exists()
    if is_pattern and not any(path.parent.glob(path.name)):
        raise DataError("the source does not exist", where=str(path), hint="check the path and the spelling")
    guessed, kind = kind is None, find_kind(path) if kind is None else kind
    if is_pattern and kind != "parquet":
        raise UsageError("only parquet files can be given as a pattern", where=str(path), hint="name one source")
    if kind != "parquet" and path.is_dir() == (kind in _BY_SUFFIX.values()):
        raise UsageError(f"a {'folder' if path.is_dir() else 'file'} is no source of kind {kind!r}", where=str(path))
    if kind not in ("folder", "classes", "img2dataset"):
        source = _open_table(path, kind, choice, listing)
    elif any(choice[:3]):
        what = f"only tables have columns, and this is {kind!r}: {KINDS[kind]}"
        raise UsageError(what, where=str(path), hint="omit --image-column, --caption-column and --label-column")
    else:
        in_tars = kind == "img2dataset" and any(path.glob("*.tar"))
        source = _open_tars(path) if in_tars else _open_folder(path, kind, listing)
    if guessed and kind == "classes" and source.classes and {name.lower() for name in source.classes} <= SPLITS:
        raise UsageError(
            f"these folders are parts of a data set, not classes: {', '.join(source.classes)}",
            where=str(path),
            hint=f"mmvit-data make {path / source.classes[0]} OUT, and so on; if they are classes: --kind classes",
        )
    if not source.rows.num_rows:
        found = ", ".join(f"{count} x {what}" for what, count in source.aside.most_common(5)) or "nothing"
        hint = "name the folder or the table that holds the images or their paths"
        raise DataError("the source holds no image", where=str(path), note=f"found: {found}", hint=hint)
    return source


def find_kind(path: Path) -> str:
    """Return the kind of a source, by what it holds.

    Raises:
        UsageError: it is nothing that is known, or several data sets.
    """
    if not path.is_dir():
        kind = _BY_SUFFIX.get(path.suffix.lower())
        if kind is None:
            known = ", ".join(_BY_SUFFIX)
            hint = f"give a folder or a file of {known}; or say what it is: --kind {'|'.join(KINDS)}"
            raise UsageError(f"{path.suffix or 'a file without suffix'} is no known source", where=str(path), hint=hint)
        return kind
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
        hint = f"name one of them, each into a folder of its own: mmvit-data make {path}/SPLIT OUT"
        raise UsageError(f"the folder holds several data sets: {splits}", where=str(path), hint=hint)
    suffixes = set()
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.endswith(".tar.meta.parquet"):
                continue  # what mmvit-data stats writes next to a shard
            is_stats = entry.name.endswith("_stats.json")
            suffixes.add("_stats.json" if is_stats else "/" if entry.is_dir() else Path(entry.name).suffix.lower())
    if ".arrow" in suffixes:
        return "datasets"
    if "_stats.json" in suffixes and suffixes & {".tar", "/"}:
        return "img2dataset"
    if ".parquet" in suffixes:
        return "parquet"
    if ".tar" in suffixes:
        hint = f"they can be used as they are: mmvit-data check {path} (tars of img2dataset: --kind img2dataset)"
        raise UsageError("the folder holds tars already", where=str(path), hint=hint)
    return kind_of_images(path)


def _open_folder(path: Path, kind: str, listing: Path) -> Source:
    tally = Tally(Counter(), Counter(), Counter(), [])
    listed = _list_rows(image_rows(path, kind, tally), listing)
    source = Source(kind, listed.rows, path, listed.fingerprint, aside=tally.aside)
    if kind == "classes":
        source.classes = _checked_names(sorted(listed.labels))
        source.labels = "names"
        source.has_captions = False
    else:
        source.has_captions = bool(tally.texts)
    if kind == "img2dataset":
        stats = img2dataset.read_stats(path)
        source.lost = img2dataset.find_shortfalls(stats, tally.images)
        source.notes = img2dataset.describe_downloads(stats, sorted(tally.images))
        for suffix in (".parquet", ".json without an image"):  # its own tables and stats
            del source.aside[suffix]
    return source


def _open_tars(path: Path) -> Source:
    stats = img2dataset.read_stats(path)
    rows, lost, present = img2dataset.open_tars(path, stats)
    source = Source("img2dataset", rows, path, _fingerprint([Path(tar) for tar in rows.tars]), lost=lost)
    source.has_captions = rows.has_captions
    source.notes = img2dataset.describe_downloads(stats, present)
    return source


def _open_table(path: Path, kind: str, choice: ColumnChoice, listing: Path) -> Source:
    start = path if path.is_dir() else path.parent
    values: Iterable[Any] = ()
    if kind == "datasets":
        table = tables.open_arrow(path)
    elif kind == "parquet":
        table = tables.open_parquet(_parquet_files(path))
        values = tables.parquet_rows(table)
    elif kind == "jsonl":
        table = tables.Table(tables.jsonl_names(path))
        values = tables.jsonl_rows(path)
    else:
        names, delimiter = csv_rows.column_names(path, "\t" if kind == "tsv" else None)
        table = tables.Table(names)
        values = csv_rows.table_rows(path, names, delimiter)
    columns = tables.choose_columns(table, choice, path)
    if kind == "datasets" or columns.image in table.picture_columns:
        packed = tables.pack(table, columns)
        labels: set[Any] = set()
        for label in packed.labels() if columns.label is not None else ():
            _add_label(labels, label)
        source = Source(kind, packed, start, _fingerprint(table.files), packed.group_rows)
    else:
        rows = (tables.table_row(one, columns, f"{path.name} row {i}") for i, one in enumerate(values))
        listed = _list_rows(rows, listing)
        labels = listed.labels
        source = Source(kind, listed.rows, start, listed.fingerprint)
    source.has_captions = bool(columns.captions)
    source.notes.append(tables.describe(columns, table.names))
    if columns.label is not None:
        feature = table.features.get(columns.label)
        named = tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()
        by_number = all(as_index(label) is not None or label in (-1, "-1") for label in labels)  # -1: not known
        source.labels = "numbers" if by_number else "names"
        source.classes = _checked_names(named or (() if by_number else sorted({str(label) for label in labels})))
    return source


def _parquet_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.parquet") if path.is_dir() else path.parent.glob(path.name))
    splits = sorted({file.name.partition("-")[0] for file in files} & SPLITS)
    if not files or len(splits) > 1:
        what = f"the files are parts of several data sets: {', '.join(splits)}" if files else "there is no *.parquet"
        folder = path if path.is_dir() else path.parent
        hint = f"mmvit-data make '{folder}/{splits[0] if splits else ''}*.parquet' OUT"
        raise UsageError(what, where=str(path), hint=hint)
    return files


def _checked_names(names: Iterable[str]) -> tuple[str, ...]:
    checked = tuple(names)
    for name in checked:
        if not name or name != name.strip() or len(name.splitlines()) > 1:
            hint = "rename the class, or leave the label out: --label-column ''"
            raise UsageError(f"{name!r} cannot be a line of classnames.txt", hint=hint)
    return checked


def _fingerprint(files: Iterable[Path]) -> str:
    statuses = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(statuses).encode()).hexdigest()
