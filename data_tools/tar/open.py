"""Opens a local path or a URL for reading by offset."""

from __future__ import annotations

from data_tools.core.errors import DataError
from data_tools.tar.byte_file import ByteFile, LocalFile
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.remote import open_remote


def open_file(place: LocationLike) -> ByteFile:
    """Open a local path or a URL.

    Raises:
        DataError: it does not exist, or cannot be read.
        UnindexableError: a web server does not support byte ranges.
        ResourceError: a remote store does not respond.
    """
    location = Location(place)
    if location.is_remote:
        return open_remote(location)
    if not location.path.is_file():
        raise DataError("the shard does not exist", where=location, hint="check the path")
    try:
        return LocalFile(location.path)
    except OSError as error:
        what = f"the shard cannot be read: {error.strerror}"
        raise DataError(what, where=location, hint="check its permissions") from error
