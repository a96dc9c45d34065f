"""Files as pyarrow reads them, whatever they are called: pyarrow itself takes no name that is not UTF-8.

It reads on one thread and prefetches nothing: a thread of pyarrow that still closes a file when Python ends aborts the
program, with exit code 134 instead of its own (Arrow issues 34314 and 50482).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet


def open_mapped(path: str | os.PathLike[str]) -> pa.BufferReader:
    """Return a file that is mapped from disk; raises OSError where it cannot be read."""
    import pyarrow as pa

    with Path(path).open("rb") as file:
        is_empty = not os.fstat(file.fileno()).st_size
        return pa.BufferReader(b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_parquet(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Return a parquet file, or some columns of it; raises OSError or ArrowException where it cannot be read."""
    from pyarrow import parquet

    return parquet.ParquetFile(open_mapped(path)).read(columns, use_threads=False)


def read_batches(file: parquet.ParquetFile, **what: Any) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an open parquet file; `what` says which, as for its `iter_batches`."""
    yield from file.iter_batches(use_threads=False, **what)
