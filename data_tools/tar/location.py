"""A place on disk or at a URL, and how it is shown to people: without its secrets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from data_tools.core.errors import UsageError

Place = Path | str  # a str is a URL

# What may be opened over the network. Others (pipe:, chains with ::) could run programs or unpack archives.
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(spec: str) -> bool:
    """Return whether a text is a URL of a store that may be opened.

    Raises:
        UsageError: another scheme, `pipe:` among them.
    """
    match = _URL.match(spec)
    try:
        urlsplit(spec if match else "")
    except ValueError:  # whose text may hold a password
        raise UsageError("a URL is not valid", hint="check its host's name and brackets") from None
    if match is None and not spec.startswith("pipe:"):
        return False
    if match is None or match.group(1).lower() not in SCHEMES or "::" in spec:
        raise UsageError(
            "shards are read from local files and from " + ", ".join(SCHEMES),
            where=shown(spec),
            note="nothing was run or opened",
            hint="download the shards and give their folder",
        )
    return True


def name_of(place: Place) -> str:
    """Return the last part of a path or URL, without a query."""
    return Path(urlsplit(place).path).name if isinstance(place, str) and is_url(place) else Path(place).name


def beside(url: str, suffix: str) -> str:
    """Return the URL of the file whose name has `suffix` added."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path + suffix))


def same_file(url: str) -> str:
    """Return what a URL and another one of the same file have in common.

    A query after a name in `.tar` is a signature, which changes; after another name it may tell which file it is.
    """
    return shown(url) if urlsplit(url).path.lower().endswith(".tar") else url


def shown(place: Place) -> str:
    """Return a path or URL for people: without the password and the query, which may hold a token."""
    text = str(place)
    if not _URL.match(text):
        return text
    parts = urlsplit(text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
