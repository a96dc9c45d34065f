"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_tools.core.errors import DataError
from data_tools.make.tables import Broken

_MAX_FIELD = 1 << 22  # characters: what a stray quote costs to read twice


def column_names(path: Path, delimiter: str | None) -> tuple[tuple[str, ...], str]:
    """Return the column names in the first line of a CSV file, and its delimiter (found where None is given)."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        head = file.readline(1 << 20)
    delimiter = delimiter or max(",;\t", key=head.count)
    names = next(csv.reader([head], delimiter=delimiter), [])
    if not head.strip() or len(set(names)) != len(names):
        what = "the table is empty" if not head.strip() else f"duplicate column name in: {', '.join(names)}"
        raise DataError(what, where=str(path), hint="add a first line with the column names")
    return tuple(names), delimiter


def table_rows(path: Path, names: Sequence[str], delimiter: str) -> Iterator[dict[str, Any] | Broken]:
    """Yield the rows of a CSV file; bytes that are not UTF-8 stay as lone surrogates, which later steps refuse.

    An unclosed quote would swallow all lines up to the next quote: only its own line is reported as broken.
    """
    csv.field_size_limit(_MAX_FIELD)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        next(reader)
        while True:
            lines.row.clear()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.go_back()
                yield Broken("damaged", f"line {lines.number}: {error} (a quote that is not closed, or not doubled?)")
                continue
            if not row:
                continue
            if len(row) != len(names):
                what = f"line {lines.number} has {len(row)} columns, the first line {len(names)}"
                yield Broken("damaged", what)
            else:
                yield dict(zip(names, row, strict=True))


class _Lines:
    """The lines of a file, of which those after the first one of a row can be read again."""

    def __init__(self, file: TextIO):
        self._file = file
        self._again: list[str] = []  # the next one last
        self.row: list[str] = []  # lines read since it was last emptied
        self.number = 0  # of the line read last, from 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else self._file.readline()
        if not line:
            raise StopIteration
        self.row.append(line)
        self.number += 1
        return line

    def go_back(self) -> None:
        """Go back to the second line of the row."""
        self._again += self.row[:0:-1]
        self.number -= len(self.row) - 1
