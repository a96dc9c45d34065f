"""Rows of tables: JSONL, parquet, and Hugging Face data sets saved on disk (Arrow files)."""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from data_tools.core.errors import DataError, UsageError, did_you_mean
from data_tools.core.mapped import open_mapped, read_batches
from data_tools.make.row import Row

# Column names that are recognised, in order of preference; case does not matter.
IMAGE_NAMES = (
    *("image", "image_path", "img", "img_path", "filepath", "file_path", "filename", "file_name", "file", "path"),
    *(
        "image_name",
        "image_file",
        "imagename",
        "picture",
        "photo",
        "image_bytes",
        "jpg",
        "jpeg",
        "png",
        "webp",
        "bytes",
    ),
)
CAPTION_NAMES = (
    *("caption", "captions", "text", "txt", "title", "alt", "alt_text", "description", "prompt", "sentence"),
    *("sentences", "raw", "comment"),
)
LABEL_NAMES = ("label", "cls", "class", "class_name", "category", "target", "class_id", "label_id")
URL_NAMES = ("url", "image_url", "img_url", "urls", "link", "uri", "src")

_PEEK_LINES = 100  # of a JSONL file, whose keys are its columns


class Columns(NamedTuple):
    """Which columns hold what; all others are metadata."""

    image: str
    captions: tuple[str, ...]
    label: str | None


class ColumnChoice(NamedTuple):
    """Columns chosen by the user; None selects by name, "" means that there is none."""

    image: str | None = None
    captions: str | None = None
    label: str | None = None
    no_captions: bool = False


class Broken(NamedTuple):
    """A row of a table that cannot be read."""

    cause: str
    what: str


class Table(NamedTuple):
    """A table: its columns, those that hold images by their type, and Hugging Face's description of each."""

    names: tuple[str, ...]
    picture_columns: tuple[str, ...] = ()
    features: Mapping[str, Any] = {}
    files: tuple[Path, ...] = ()


class PackedRows(NamedTuple):
    """Rows with the bytes of their images, of several parquet or Arrow files; `starts[i]` is the first row of file i.

    Rows of a parquet file can only be read one after the other, in groups of up to `group_rows`.
    """

    files: tuple[str, ...]
    starts: tuple[int, ...]
    columns: Columns
    num_rows: int
    group_rows: int | None

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of these numbers, which rise by one in a parquet file."""
        if self.group_rows is not None:
            yield from self._parquet_rows(numbers)
            return
        for number in numbers:
            file, i = self._find(number)
            values = _arrow_table(self.files[file]).slice(i, 1).to_pylist()[0]
            yield table_row(values, self.columns, self._place(file, i))

    def labels(self) -> Iterator[Any]:
        """Yield the label of each row."""
        for path in self.files:
            if self.group_rows is None:
                yield from _arrow_table(path)[self.columns.label].to_pylist()
            else:
                for batch in read_batches(_parquet_file(path), columns=[self.columns.label]):
                    yield from batch.column(0).to_pylist()

    def _parquet_rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        first, last = numbers[0], numbers[-1]
        for file in range(self._find(first)[0], self._find(last)[0] + 1):
            start = self.starts[file]
            for i, values in _parquet_values(self.files[file], max(first - start, 0), last - start):
                yield table_row(values, self.columns, self._place(file, i))

    def _find(self, number: int) -> tuple[int, int]:
        file = bisect.bisect_right(self.starts, number) - 1
        return file, number - self.starts[file]

    def _place(self, file: int, i: int) -> str:
        return f"{Path(self.files[file]).name} row {i}"


def _parquet_values(path: str, first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and values of the rows `first` to `last` (or the end), reading only the row groups they lie in."""
    file = _parquet_file(path)
    start = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first < start + count and start <= last:
            i = start
            for batch in read_batches(file, batch_size=64, row_groups=[group]):
                if i + len(batch) > first and i <= last:
                    rows = batch.to_pylist()
                    yield from ((i + j, values) for j, values in enumerate(rows) if first <= i + j <= last)
                i += len(batch)
        start += count


def _parquet_file(path: str | Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(open_mapped(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"the file is not a parquet file: {error}", where=str(path), hint="copy or download it again"
        ) from error


@functools.lru_cache(16)
def _arrow_table(path: str) -> pa.Table:
    """Open an Arrow stream or file without reading its images: the table lies in the memory-mapped file."""
    try:
        source = open_mapped(path)
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        hint = "copy or save the data set again"
        raise DataError(f"the file is not an Arrow table: {error}", where=path, hint=hint) from error


def table_row(values: Mapping[str, Any] | Broken, columns: Columns, place: str) -> Row:
    """Return the values of a table's row as a `Row`; `place` names the row where no path does."""
    if isinstance(values, Broken):
        return Row(place, fault=(values.cause, values.what))
    image = values.get(columns.image)
    path = image if isinstance(image, str) else None
    if isinstance(image, Mapping):  # {"bytes": ..., "path": ...} of Hugging Face
        path = image.get("path")
        image = image.get("bytes") or path
    used = {columns.image, *columns.captions, columns.label}
    meta = {name: value for name, value in values.items() if name not in used and not isinstance(value, bytes)}
    captions = tuple(values.get(name) for name in columns.captions)
    label = None if columns.label is None else values.get(columns.label)
    return Row(path or place, image if isinstance(image, str | bytes) else None, captions, label, meta)


def open_parquet(paths: Sequence[Path]) -> Table:
    """Read the schemas of parquet files."""
    return _typed_table(paths, [_parquet_file(path).schema_arrow for path in paths])


def open_arrow(folder: Path) -> Table:
    """Read the state of a Hugging Face data set saved on disk."""
    info = _read_object(folder / "dataset_info.json") if (folder / "dataset_info.json").exists() else {}
    if (folder / "state.json").exists():
        state = _read_object(folder / "state.json")
        if state.get("_indices_files") or state.get("_indices_data_files"):
            hint = "load and save it again with a newer version of the library datasets"
            raise DataError("the data set's rows are chosen by an index file", where=str(folder), hint=hint)
        names = [str(entry.get("filename")) for entry in state.get("_data_files") or []]
    else:
        names = sorted(path.name for path in folder.glob("*.arrow"))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        what = f"the data set lacks {missing[0]}" if missing else "the data set has no *.arrow file"
        raise DataError(what, where=str(folder), hint="copy or save the data set again")
    paths = [folder / name for name in names]
    _arrow_table.cache_clear()  # the files may have changed since this process read them
    table = _typed_table(paths, [_arrow_table(str(path)).schema for path in paths])
    return table._replace(features={**table.features, **(info.get("features") or {})})


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError("the file is not a JSON object", where=str(path), hint="copy or save the data set again")
    return found


def _typed_table(paths: Sequence[Path], schemas: Sequence[pa.Schema]) -> Table:
    schema = schemas[0]
    for path, other in zip(paths, schemas, strict=True):
        if not other.equals(schema):
            raise DataError(
                f"the file has other columns than {paths[0].name}: {', '.join(other.names)}",
                where=str(path),
                note=f"{paths[0].name} has {', '.join(schema.names)}; types must be equal too",
                hint="put files with different columns into separate folders",
            )
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"] if schema.metadata else {}
    except (KeyError, ValueError, TypeError):
        features = {}
    return Table(
        tuple(schema.names),
        tuple(field.name for field in schema if _is_picture(field.type)),
        features if isinstance(features, dict) else {},
        tuple(paths),
    )


def _is_picture(kind: pa.DataType) -> bool:
    binary = pa.types.is_binary, pa.types.is_large_binary
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and any(test(field.type) for test in binary) for field in kind)
    return any(test(kind) for test in binary)


def pack(table: Table, columns: Columns) -> PackedRows:
    """Return the rows of a parquet or Arrow table that holds its images."""
    files = tuple(str(path) for path in table.files)
    if table.files[0].suffix == ".arrow":
        counts, group_rows = [_arrow_table(path).num_rows for path in files], None
    else:
        metadata = [_parquet_file(path).metadata for path in files]
        counts = [one.num_rows for one in metadata]
        group_rows = max((one.row_group(i).num_rows for one in metadata for i in range(one.num_row_groups)), default=1)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return PackedRows(files, tuple(starts), columns, sum(counts), group_rows)


def parquet_rows(table: Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files that hold no images."""
    for path in table.files:
        for batch in read_batches(_parquet_file(path), batch_size=1024):
            yield from batch.to_pylist()


def jsonl_names(path: Path) -> tuple[str, ...]:
    """Return the keys that the first lines of a JSONL file have."""
    names: dict[str, None] = {}
    for _, values in zip(range(_PEEK_LINES), jsonl_rows(path), strict=False):
        if not isinstance(values, Broken):
            names |= dict.fromkeys(values)
    if not names:
        hint = "write one JSON object per line"
        raise DataError("the first lines of the file contain no JSON object", where=str(path), hint=hint)
    return tuple(names)


def jsonl_rows(path: Path) -> Iterator[dict[str, Any] | Broken]:
    """Yield the objects of a JSONL file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                cause = "not-utf8" if isinstance(error, UnicodeDecodeError) else "bad-json"
                yield Broken(cause, f"line {number}: {error}")
                continue
            is_object = isinstance(found, dict)
            yield found if is_object else Broken("bad-json", f"line {number} is not a JSON object")


def choose_columns(table: Table, choice: ColumnChoice, where: Path) -> Columns:
    """Return which columns hold the images, captions and labels: those the user names, else those with usual names.

    Raises:
        UsageError: a column that is not there, or none that is known.
    """
    found = f"columns found: {', '.join(table.names)}"
    known = {name.lower(): name for name in reversed(table.names)}

    def named(given: str, option: str) -> str:
        if given not in table.names:
            hint = f"{did_you_mean(given, table.names)} {option} NAME".strip()
            raise UsageError(f"there is no column {given!r}", where=str(where), note=found, hint=hint)
        return given

    def guess(names: Iterable[str]) -> str | None:
        return next((known[name] for name in names if name in known), None)

    if choice.image is not None:
        image: str | None = named(choice.image, "--image-column")
    else:
        pictures = [name for name in table.picture_columns if name.lower() in IMAGE_NAMES] or table.picture_columns
        image = next(iter(pictures), None) or guess(IMAGE_NAMES)
    if image is None:
        raise _no_image_column(where, found, guess(URL_NAMES), guess(CAPTION_NAMES))
    label = guess(LABEL_NAMES) if choice.label is None else None
    if choice.label:
        label = named(choice.label, "--label-column")
    captions: tuple[str, ...] = ()
    if choice.captions is not None:
        captions = tuple(named(name.strip(), "--caption-column") for name in choice.captions.split(","))
    elif not choice.no_captions:
        captions = tuple(name for name in (guess(CAPTION_NAMES),) if name is not None)
    if not captions and label is None and not choice.no_captions:
        raise UsageError(
            "cannot determine which column contains the captions",
            where=str(where),
            note=found,
            hint="--caption-column NAME, or --no-captions for images without captions",
        )
    return Columns(image, captions, label)


def _no_image_column(where: Path, found: str, url: str | None, caption: str | None) -> UsageError:
    if url is None:
        what = "cannot determine which column contains the images or their paths"
        return UsageError(what, where=str(where), note=found, hint="--image-column NAME")
    kind = {".parquet": "parquet", ".jsonl": "jsonl", ".tsv": "tsv"}.get(where.suffix, "csv")
    return UsageError(
        "the table contains URLs, and mmvit-data does not download images",
        where=f"{where}, column {url!r}",
        note=found,
        hint=f"pip install img2dataset; img2dataset --url_list {where} --input_format {kind} --url_col {url} "
        f"--caption_col {caption or 'CAPTION'} --output_format webdataset --output_folder DIR; mmvit-data make DIR OUT",
    )


def describe(columns: Columns, names: Sequence[str]) -> str:
    """Return a sentence that lists which column is used for what."""
    captions = ", ".join(map(repr, columns.captions)) or "none"
    label = "none" if columns.label is None else repr(columns.label)
    rest = ", ".join(name for name in names if name not in {columns.image, *columns.captions, columns.label}) or "none"
    return f"columns: images {columns.image!r}, captions {captions}, labels {label}; kept as metadata: {rest}"
