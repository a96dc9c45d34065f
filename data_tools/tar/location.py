"""Location of a file: on this disk or at a URL; printed without its secrets."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from data_tools.core.errors import UsageError
from data_tools.core.secrets import hide_secrets

# What may be opened over the network. Others (pipe:, chains with ::) could run programs or unpack archives.
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Location:
    """A file on this disk or at a URL; `str`, `repr` and f-strings show it without its secrets.

    A URL may contain a password, and a token in its query: both are removed whenever a location is printed. Code that
    opens the file uses `path` or `url`. A location is immutable, hashable and may be sent to other processes.

    Args:
        place: a path, a URL (only as a `str`), or a location, which is copied.

    Raises:
        UsageError: a URL that is not valid or has an unknown scheme, or a `pipe:` command.
    """

    _text: str
    is_remote: bool

    def __init__(self, place: LocationLike):
        if isinstance(place, Location):
            text, is_remote = place._text, place.is_remote
        else:
            is_remote = isinstance(place, str) and _is_url(place)
            text = str(place) if is_remote else str(Path(place))
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "is_remote", is_remote)

    def __str__(self) -> str:
        return without_secrets(self._text) if self.is_remote else self._text

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @property
    def path(self) -> Path:
        """The path of a local file."""
        assert not self.is_remote, f"{self} is not on this disk"
        return Path(self._text)

    @property
    def url(self) -> str:
        """The complete URL of a remote file, with its secrets: for the call that opens it, not for printing."""
        assert self.is_remote, f"{self} is not a URL"
        return self._text

    @property
    def name(self) -> str:
        """The last part of the path or URL, without a query."""
        return Path(urlsplit(self._text).path).name if self.is_remote else Path(self._text).name

    @property
    def file_id(self) -> str:
        """A SHA-256 (hex) that two locations of the same file share.

        A query after a name in `.tar` is a signature, which changes; after another name it may identify the file.
        """
        if not self.is_remote:
            return hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        is_tar = urlsplit(self._text).path.lower().endswith(".tar")
        return hashlib.sha256((str(self) if is_tar else self._text).encode()).hexdigest()

    def next_to(self, suffix: str) -> Location:
        """Return the location of the file next to this one whose name has `suffix` added."""
        if not self.is_remote:
            return Location(Path(self._text + suffix))
        parts = urlsplit(self._text)
        return Location(urlunsplit(parts._replace(path=parts.path + suffix)))


LocationLike = Location | str | os.PathLike[str]


def without_secrets(text: str) -> str:
    """Return a text with each URL in it shown without its password, query and fragment.

    For texts from users, such as a pattern of shards, that are not locations yet.
    """
    if not _URL.match(text) or "::" in text:
        return hide_secrets(text)
    try:
        parts = urlsplit(text)
    except ValueError:
        return f"{text.partition('://')[0]}://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _is_url(text: str) -> bool:
    """Return whether a text is a URL of a store that may be opened.

    Raises:
        UsageError: another scheme, `pipe:` among them.
    """
    match = _URL.match(text)
    try:
        urlsplit(text if match else "")
    except ValueError:  # its text may contain a password
        raise UsageError("a URL is not valid", hint="check its host's name and brackets") from None
    if match is None and not text.startswith("pipe:"):
        return False
    if match is None or match.group(1).lower() not in SCHEMES or "::" in text:
        raise UsageError(
            "shards are read from local files and from " + ", ".join(SCHEMES),
            where="pipe:..." if match is None else without_secrets(text),  # a command may contain secrets anywhere
            note="nothing was run or opened",
            hint="download the shards and pass their folder",
        )
    return True
