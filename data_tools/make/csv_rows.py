"""Rows of CSV and TSV files, in UTF-8, or in UTF-16 with a byte order mark."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from data_tools.core.errors import DataError, UsageError
from data_tools.make.options import DELIMITERS
from data_tools.make.tables import CAPTION_NAMES, IMAGE_NAMES, LABEL_NAMES, Broken

_MAX_FIELD = 1 << 22  # characters: what a stray quote costs to read twice
_MAX_BROKEN = 0.01  # of the rows: more that are not UTF-8 are a table in another encoding
_KNOWN = {*IMAGE_NAMES, *CAPTION_NAMES, *LABEL_NAMES}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


class CsvFormat(NamedTuple):
    """How a CSV file is written.

    Args:
        path: the file.
        names: of the columns, without blanks around them.
        delimiter: between columns.
        encoding: "utf-8-sig" or "utf-16".
        has_blanks: there are blanks around the names, and so around the values, to be removed.
    """

    path: Path
    names: tuple[str, ...]
    delimiter: str
    encoding: str
    has_blanks: bool


def read_format(path: Path, delimiter: str | None) -> CsvFormat:
    """Return how a CSV file is written, from its beginning; a delimiter of None is detected.

    Raises:
        DataError: the table is empty, or two columns have the same name.
        UsageError: it is not UTF-8, and not UTF-16 with a byte order mark.
    """
    encoding = _encoding(path)
    with path.open(encoding=encoding, errors=_errors(encoding), newline="") as file:
        lines = _Lines(file, path)
        head = next(lines, "")
    if fault := _find_fault(lines.row, 1):
        raise _not_utf8(path, fault)
    delimiter = DELIMITERS.get(delimiter or "", delimiter) or max(",;\t|", key=lambda each: _score(_split(head, each)))
    raw = _split(head, delimiter)
    names = tuple(name.strip() for name in raw)
    if not head.strip() or len(set(names)) != len(names):
        what = "the table is empty" if not head.strip() else f"duplicate column name in: {', '.join(names)}"
        raise DataError(what, where=str(path), hint="add a first line with the column names")
    return CsvFormat(path, names, delimiter, encoding, names != tuple(raw))


def _split(head: str, delimiter: str) -> list[str]:
    return next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])


def _score(names: list[str]) -> tuple[bool, int, int]:
    lower = {name.strip().lower() for name in names}
    return not lower.isdisjoint(IMAGE_NAMES), len(lower & _KNOWN), len(names)


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(_UTF16) and not head.startswith(_UTF32):
        return "utf-16"
    if head.startswith(_UTF32) or 4 * head.count(0) > len(head):
        raise _not_utf8(path, "over a quarter of its bytes are 0, as in UTF-16 without a byte order mark or UTF-32")
    return "utf-8-sig"


def _errors(encoding: str) -> str:
    return "strict" if encoding == "utf-16" else "surrogateescape"


def _not_utf8(path: Path, what: str) -> UsageError:
    hint = f"convert it, for example: iconv -f CP949 -t UTF-8 {path.name} > utf8{path.suffix} (or -f LATIN1, UTF-16LE)"
    return UsageError(f"the table is not UTF-8: {what}", where=str(path), note="nothing was started", hint=hint)


def table_rows(table: CsvFormat, image: str) -> Iterator[dict[str, Any] | Broken]:
    """Yield the rows of a CSV file; an unclosed quote costs its own line alone, not all up to the next quote.

    Args:
        table: how the file is written.
        image: column of the images' paths, which alone may hold other bytes than UTF-8, as names of files do.

    Raises:
        UsageError: more than one row, and one in a hundred, are not UTF-8.
    """
    csv.field_size_limit(_MAX_FIELD)
    first_fault, num_faults, num_rows = "", 0, 0
    with table.path.open(encoding=table.encoding, errors=_errors(table.encoding), newline="") as file:
        lines = _Lines(file, table.path)
        reader = csv.reader(lines, delimiter=table.delimiter, strict=True, skipinitialspace=table.has_blanks)
        next(reader)
        while True:
            lines.row.clear()
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                lines.go_back()
                yield Broken("damaged", f"line {lines.number}: {error} (a quote that is not closed, or not doubled?)")
                continue
            if not row:
                continue
            num_rows += 1
            values = dict(
                zip(table.names, (value.strip() if table.has_blanks else value for value in row), strict=False)
            )
            fault = _find_fault(lines.row, lines.number) if _is_broken(values, image) else ""
            if fault:
                first_fault, num_faults = first_fault or fault, num_faults + ("NUL" not in fault)
                yield Broken("not-utf8", fault)
            elif len(row) != len(table.names):
                what = f"line {lines.number} has {len(row)} columns, the first line {len(table.names)}"
                yield Broken("damaged", what)
            else:
                yield values
    if num_faults > max(1, _MAX_BROKEN * num_rows):
        raise _not_utf8(table.path, f"{first_fault}, and {num_faults - 1} more of {num_rows} rows have such bytes")


def _is_broken(values: dict[str, str], image: str) -> bool:
    text = "".join(value for name, value in values.items() if name != image)
    return "\0" in text or "\0" in values.get(image, "") or not _encodes(text)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_fault(lines: list[str], last: int) -> str:
    """Return where the first byte that is not UTF-8, or a NUL, stands in the lines that end with number `last`."""
    for number, line in enumerate(lines, start=last - len(lines) + 1):
        data = line.encode("utf-8", "surrogateescape")
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return f"line {number}, byte {error.start + 1} is 0x{data[error.start]:02X}"
        if b"\0" in data:
            return f"line {number}, byte {data.index(0) + 1} is NUL"
    return ""


class _Lines:
    """The lines of a file, of which those after the first one of a row can be read again."""

    def __init__(self, file: TextIO, path: Path):
        self._file = file
        self._path = path
        self._again: list[str] = []  # the next one last
        self.row: list[str] = []  # lines read since it was last emptied
        self.number = 0  # of the line read last, from 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        try:
            line = self._again.pop() if self._again else self._file.readline()
        except UnicodeDecodeError as error:
            what = f"it starts as UTF-16, and {error.reason} after line {self.number}"
            raise _not_utf8(self._path, what) from error
        if not line:
            raise StopIteration
        self.row.append(line)
        self.number += 1
        return line

    def go_back(self) -> None:
        """Go back to the second line of the row."""
        self._again += self.row[:0:-1]
        self.number -= len(self.row) - 1
