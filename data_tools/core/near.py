"""What a user may have meant: near words, and files near a path that does not exist."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from data_tools.core.errors import DataError

_MAX_NAMES = 5  # of a folder in a message


def plain(word: str) -> str:
    """Return a word as it is compared: lower case, without dashes, underscores and dots."""
    return word.lower().translate({ord(mark): None for mark in "-_. "})


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that a word is closest to, None if none is close; case, dashes and underscores do not count."""
    by_plain = {plain(choice): choice for choice in reversed([*choices])}
    found = difflib.get_close_matches(plain(word), list(by_plain), n=1)
    return by_plain[found[0]] if found else None


def near_path(path: str | os.PathLike[str]) -> str:
    """Return where a path that does not exist may be: a near name in the last folder that does, or what is in it."""
    wanted = Path(path)
    missing = wanted
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        names = sorted(name for name in os.listdir(missing.parent) if not name.startswith("."))  # noqa: PTH208
    except OSError:
        return ""
    stem = missing.stem.lower()
    near = next((name for name in names if Path(name).stem.lower() == stem), None) or nearest(missing.name, names)
    if near:
        rest = wanted.relative_to(missing)
        whole = missing.parent / near / rest
        return f"did you mean {whole if whole.exists() else missing.parent / near}?"
    if missing.parent == Path() or not names:
        return ""
    shown = ", ".join(str(missing.parent / name) for name in names[:_MAX_NAMES])
    return f"{missing.parent} contains {shown}{', ...' if len(names) > _MAX_NAMES else ''}"


def check_there(paths: Iterable[str | os.PathLike[str]], kind: str) -> None:
    """Raise DataError for the first path that does not exist; `kind` names what it should be, such as "image"."""
    for path in paths:
        if not os.path.lexists(path):
            hint = near_path(path) or "check the path"
            raise DataError(f"the {kind} does not exist", where=os.fspath(path), hint=hint)
