"""Files as pyarrow reads them, whatever they are called: pyarrow itself takes no name that is not UTF-8."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def open_mapped(path: str | os.PathLike[str]) -> pa.BufferReader:
    """Return a file that is mapped from disk; raises OSError where it cannot be read."""
    import pyarrow as pa

    with Path(path).open("rb") as file:
        is_empty = not os.fstat(file.fileno()).st_size
        return pa.BufferReader(b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
