"""Opens a local path or a URL for reading by offset."""

from __future__ import annotations

from pathlib import Path

from data_tools.core.errors import DataError
from data_tools.tar.byte_file import ByteFile, LocalFile
from data_tools.tar.location import Place, is_url
from data_tools.tar.remote import open_remote


def open_file(place: Place) -> ByteFile:
    """Open a local path or a URL.

    Raises:
        DataError: it does not exist, or cannot be read.
        UnindexableError: a web server does not support byte ranges.
        ResourceError: a remote store does not respond.
    """
    if isinstance(place, str) and is_url(place):
        return open_remote(place)
    path = Path(place)
    if not path.is_file():
        raise DataError("the shard does not exist", where=str(place), hint="check the path and the spelling")
    try:
        return LocalFile(path)
    except OSError as error:
        what = f"the shard cannot be read: {error.strerror}"
        raise DataError(what, where=str(place), hint="check its permissions") from error
