"""Hides the secrets of URLs in messages."""

from __future__ import annotations

import re

# "//" of a URL is "/" where it was taken for a path; a query in quotes ends with them.
_USER = re.compile(r"(?<=[A-Za-z0-9+.-]:/)(/?)[^\s/?#]*@")
_QUERY = re.compile(r"([A-Za-z0-9+.-]:/[^\s?#]*)[?#][^\s'\"]*")


def hide_secrets(text: str) -> str:
    """Return a message in which each URL is shown without its password, query and fragment."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text)) if ":/" in text else text
