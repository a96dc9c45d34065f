"""Tables as files for other programs: CSV, JSON lines or Parquet, by the suffix of the file."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.core.errors import UsageError
from data_tools.core.files import make_folder, write_atomic

Rows = Sequence[Mapping[str, Any]]


def check_table_path(path: Path) -> None:
    """Raise UsageError if no table can be written to a path."""
    if path.suffix.lower() not in WRITERS or path.is_dir():
        raise UsageError(f"cannot write a table to {path.name}", where="--out", hint=f"use {', '.join(WRITERS)}")


def write_table(rows: Rows, path: Path) -> None:
    """Write rows with the same names in the same order; the file is complete or absent.

    Raises:
        UsageError: the suffix is not .csv, .jsonl or .parquet.
    """
    check_table_path(path)
    make_folder(path.absolute().parent)
    write_atomic(path, WRITERS[path.suffix.lower()](rows))


def _csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def _jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _parquet(rows: Rows) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
