"""What a source of images is: its kind, and its rows in a form that any process can read by number."""

from __future__ import annotations

import array
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_tools.core.errors import DataError, UsageError
from data_tools.core.folders import SPLITS
from data_tools.core.names import as_text
from data_tools.core.near import near_path
from data_tools.make import coco, csv_rows, img2dataset, tables
from data_tools.make.folder_rows import TABLES, Tally, image_rows
from data_tools.make.guess import check_guess, folder_of_images, guess_source
from data_tools.make.options import KINDS, MakeOptions
from data_tools.make.row import Row
from data_tools.make.tables import ColumnChoice, Table
from data_tools.sample.classes import MAX_CLASSES, as_integer, describe_numbers, order_classes

_FIRST_ROWS = 50  # of a table, whose images are looked for


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
        if len(labels) > MAX_CLASSES:
            hint = "name another column with --label-column, or none with --label-column ''"
            raise UsageError(f"the label column has more than {MAX_CLASSES} different values", hint=hint)


def open_source(path: Path, options: MakeOptions, listing: Path) -> Source:
    """Look through a source.

    Args:
        path: file or folder.
        options: its kind (None detects it), the columns of a table, and what else is known of it.
        listing: file to write the list of the rows to, where the source itself does not hold them.

    Raises:
        UsageError: the source is none of `KINDS`, it is not clear which, or its columns are not known.
        DataError: the source is damaged or empty.
    """
    given, is_pattern = path, not path.exists()
    if is_pattern and not any(path.parent.glob(path.name)):
        raise DataError("the source does not exist", where=str(path), hint=near_path(path) or "check the path")
    if not is_pattern and not path.is_file() and not path.is_dir():
        raise UsageError("the source is a pipe, socket or device", where=str(path), hint="name a file or a folder")
    kind = options.kind
    if kind is None:
        path, kind = guess_source(path)
    if is_pattern and kind != "parquet":
        raise UsageError("only parquet files can be given as a pattern", where=str(path), hint="pass one source")
    if kind != "parquet" and path.is_dir() == (kind in (*TABLES.values(), "coco")):
        raise UsageError(f"a {'folder' if path.is_dir() else 'file'} is not a source of kind {kind!r}", where=str(path))
    columns = (options.image_column, options.caption_column, options.label_column)
    if kind not in ("folder", "classes", "img2dataset"):
        if options.delimiter is not None and kind not in ("csv", "tsv"):
            raise UsageError("only CSV and TSV have a delimiter", where=str(path), hint="omit --delimiter")
        source = _open_table(path, kind, options, listing)
        if path != given:
            source.notes.insert(0, f"captions: found in {path.name}")
    elif any(columns) or options.delimiter is not None:
        what = f"only tables have columns, and this is {kind!r}: {KINDS[kind]}"
        hint = "omit --image-column, --caption-column, --label-column and --delimiter"
        raise UsageError(what, where=str(path), hint=hint)
    else:
        in_tars = kind == "img2dataset" and any(path.glob("*.tar"))
        source = _open_tars(path) if in_tars else _open_folder(path, kind, options, listing)
    if not source.rows.num_rows:
        found = ", ".join(f"{count} x {what}" for what, count in source.aside.most_common(5)) or "nothing"
        hint = "pass the folder or table that contains the images or their paths"
        raise DataError("the source contains no image", where=str(path), note=f"found: {found}", hint=hint)
    return source


def _open_folder(path: Path, kind: str, options: MakeOptions, listing: Path) -> Source:
    tally = Tally(Counter(), Counter(), Counter(), [])
    listed = _list_rows(image_rows(path, kind, tally), listing)
    source = Source(kind, listed.rows, path, listed.fingerprint, aside=tally.aside)
    if kind == "classes" and listed.labels:
        if options.kind is None and options.classnames is None:
            check_guess(path, sorted(listed.labels), tally.tables)
        # Names that a file of class names numbers have no numbers of their own.
        ordered = sorted(listed.labels) if options.classnames else order_classes(listed.labels)
        source.classes = _checked_names(ordered)
        source.notes += describe_numbers(source.classes, listed.labels)
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


def _open_table(path: Path, kind: str, options: MakeOptions, listing: Path) -> Source:
    table, read = _read_table(path, kind, options)
    choice = ColumnChoice(options.image_column, options.caption_column, options.label_column, not options.captions)
    columns = tables.choose_columns(table, choice, path)
    start = path if path.is_dir() else path.parent
    notes = [tables.describe(columns, table.names)]
    if kind == "datasets" or columns.image in table.picture_columns:
        packed = tables.pack(table, columns)
        labels: set[Any] = set()
        for label in packed.labels() if columns.label is not None else ():
            _add_label(labels, label)
        source = Source(kind, packed, start, _fingerprint(table.files), packed.group_rows)
    else:
        numbered = enumerate(read(columns.image))
        rows = (tables.table_row(one, columns, f"{path.name} row {i}") for i, one in numbered)
        listed = _list_rows(rows, listing)
        labels = listed.labels
        if options.image_root is None:
            first = listed.rows.rows(range(min(_FIRST_ROWS, listed.rows.num_rows)))
            found = folder_of_images(path, [row.image for row in first if isinstance(row.image, str)])
            notes += [f"images: found in {found}"] if found != start else []
            start = found
        source = Source(kind, listed.rows, start, listed.fingerprint)
    source.has_captions = bool(columns.captions)
    source.notes = notes
    if columns.label is not None:
        _number_labels(source, table.features.get(columns.label), labels)
    return source


def _read_table(path: Path, kind: str, options: MakeOptions) -> tuple[Table, Callable[[str], Iterable[Any]]]:
    """Return a table, and a function of its image column that reads its rows."""
    if kind in ("csv", "tsv"):
        csv = csv_rows.read_format(path, options.delimiter)
        return Table(csv.names), lambda image: csv_rows.table_rows(csv, image)
    if kind == "coco":
        captions = coco.read_coco(path)
        return Table(captions.names), lambda _: captions.rows()
    if kind == "jsonl":
        return Table(tables.jsonl_names(path)), lambda _: tables.jsonl_rows(path)
    table = tables.open_arrow(path) if kind == "datasets" else tables.open_parquet(_parquet_files(path))
    return table, lambda _: tables.parquet_rows(table)


def _number_labels(source: Source, feature: Any, labels: set[Any]) -> None:
    """Say whether the labels of a table are names or numbers, and which classes there are."""
    named = tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()
    by_number = all(as_integer(label) is not None for label in labels)  # below 0, such as -1: not known
    source.labels = "numbers" if by_number else "names"
    source.classes = _checked_names(named or (() if by_number else order_classes({str(label) for label in labels})))
    if not by_number or named:
        source.notes += describe_numbers(source.classes, source.classes)


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
        if not name or name != name.strip() or len(name.splitlines()) > 1 or as_text(name) != name:
            hint = "rename the class, or leave the label out: --label-column ''"
            raise UsageError(f"{name!r} cannot be written as a line of classnames.txt", hint=hint)
    return checked


def _fingerprint(files: Iterable[Path]) -> str:
    statuses = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(statuses).encode()).hexdigest()
