"""File names as valid text: a name may hold bytes that are not UTF-8, which JSON and parquet do not take."""

from __future__ import annotations

import os
import re

_LOOKS_STORED = re.compile(rb"\\(?=x(?:[89a-f][0-9a-f]|5c))")
_STORED = re.compile(rb"\\x([89a-f][0-9a-f]|5c)")


def as_text(name: str) -> str:
    """Return text that can be stored: halves of surrogate pairs, as in names that are not UTF-8, become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def store_name(name: str) -> str:
    r"""Return a file name as valid text: bytes that are not UTF-8 become \xNN; `restore_name` is the inverse.

    Other names stay as they are. A backslash that would be read as such an escape becomes \x5c.
    """
    return _LOOKS_STORED.sub(rb"\\x5c", os.fsencode(name)).decode("utf-8", "backslashreplace")


def restore_name(text: str) -> str:
    """Return the file name that `store_name` stored, as Python's file functions take it."""
    return os.fsdecode(_STORED.sub(lambda found: bytes.fromhex(found[1].decode()), text.encode()))
