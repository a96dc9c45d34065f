"""Turns what a user writes for "these shards" into a list of local tar files."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.errors import DataError, UsageError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_URL = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]+://)")

ShardSpec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def expand_shards(spec: ShardSpec) -> list[Path]:
    """Return the shards that `spec` names, in a fixed order, each one existing and named once.

    A spec is a tar file, a folder (all its `*.tar`, sorted), a brace pattern (`train-{000..012}.tar`,
    `{train,val}-0.tar`), a glob (`train-*.tar`), or a list of these. A path that exists is taken as it is, also with
    braces or stars in its name.

    Raises:
        DataError: nothing matches, a shard of a brace range is missing, or a shard is named twice.
        UsageError: a URL or a `pipe:` command; only local files are opened.
    """
    parts = [os.fspath(spec)] if isinstance(spec, str | os.PathLike) else [os.fspath(part) for part in spec]
    if not parts:
        raise UsageError("no shards were given", mend="name a tar file, a folder of tars, or a pattern")
    shards = [path for part in parts for path in _expand_one(part)]
    seen: set[Path] = set()
    for path in shards:
        if path.resolve() in seen:
            raise DataError("a shard is named twice", where=str(path), mend="name each shard once")
        seen.add(path.resolve())
    return shards


def _expand_one(spec: str) -> list[Path]:
    if _URL.match(spec):
        raise UsageError(
            "shards are read from local files only", where=spec, mend="download the shards and give their folder"
        )
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        shards = sorted(child for child in path.glob("*.tar") if child.is_file() and not child.name.startswith("."))
        if not shards:
            raise _nothing(spec, "the folder holds no *.tar file")
        return shards
    return list(itertools.chain.from_iterable(_expand_glob(one, spec) for one in _expand_braces(str(path))))


def _expand_glob(pattern: str, spec: str) -> list[Path]:
    if Path(pattern).is_file():
        return [Path(pattern)]
    names = glob.glob(pattern)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    matches = sorted(Path(name) for name in names if Path(name).is_file())
    if not matches:
        raise _nothing(spec, "nothing matches" if pattern == spec else f"{pattern} does not exist")
    return matches


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for choice in _choices(match.group(1)):
        yield from (head + choice + rest for rest in _expand_braces(tail))


def _choices(inside: str) -> list[str]:
    numbers = _RANGE.match(inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    if int(last) < int(first):
        raise UsageError("a brace range must rise", where=f"{{{inside}}}", mend=f"write {{{last}..{first}}}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _nothing(spec: str, why: str) -> DataError:
    return DataError(
        f"no shards found: {why}",
        where=spec,
        mend="name a tar file, a folder of tars, a range like train-{00000..00012}.tar, or a glob like 'train-*.tar'",
    )
