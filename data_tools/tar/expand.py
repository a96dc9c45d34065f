"""Expands a shard specification (path, folder, pattern, URL) to a list of tar files."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_tools.core.errors import DataError, UsageError
from data_tools.core.folders import IMAGES
from data_tools.core.near import near_path
from data_tools.tar.location import Location, without_secrets

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_MAX_CHOICES = 1_000_000
_SIDECARS = (".tar.idx", ".tar.meta.parquet")  # files that mmvit writes next to shards
_NO_TAR = IMAGES | {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml"}

ShardSpec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def expand_shards(spec: ShardSpec) -> list[Location]:
    """Return the shards that `spec` names, in a fixed order, without repetition; local ones exist.

    A spec is a tar file, a folder (all its `*.tar`, sorted), a brace pattern (`train-{000..012}.tar`,
    `{train,val}-0.tar`), a glob (`train-*.tar`), a URL (`https://host/train-{000..012}.tar`: braces, no globs; not
    opened yet), or a list of these. An existing path is used literally, even with braces or stars in its name.

    Raises:
        DataError: nothing matches, a shard of a brace range is missing, or a shard is listed twice.
        UsageError: a `pipe:` command or a URL with an unsupported scheme.
    """
    parts = [os.fspath(spec)] if isinstance(spec, str | os.PathLike) else [os.fspath(part) for part in spec]
    if not parts:
        raise UsageError("no shards were given", hint="name a tar file, a folder of tars, or a pattern")
    shards = [path for part in parts for path in _expand_one(part)]
    seen: set[str] = set()
    for shard in shards:
        if shard.file_id in seen:
            raise DataError("a shard is listed twice", where=shard, hint="list each shard once")
        seen.add(shard.file_id)
    return shards


def spec_text(spec: Sequence[str]) -> str:
    """Return the shards as a user named them, without the secrets of URLs, for messages and titles."""
    return " ".join(map(without_secrets, spec))


def _expand_one(spec: str) -> list[Location]:
    if spec.lower().startswith("file://"):
        spec = _local_path(spec)
    if Location(spec).is_remote:
        return [Location(url) for url in _expand_braces(spec)]
    path = Path(os.path.expanduser(spec))  # noqa: PTH111 (Path.expanduser raises for unknown users)
    if path.is_file():
        if path.name.endswith(_SIDECARS):
            hint = f"name only the tars, such as '{path.parent / '*.tar'}', or their folder"
            raise UsageError("not a shard: this is the index or metadata of one", where=spec, hint=hint)
        if path.suffix.lower() in _NO_TAR:
            hint = "name a tar file or a folder of tars; mmvit-data make creates them from images and tables"
            raise UsageError("not a shard: shards are tar files", where=spec, hint=hint)
        return [Location(path)]
    if path.is_dir():
        shards = sorted(child for child in path.glob("*.tar") if child.is_file() and not child.name.startswith("."))
        if not shards:
            raise _nothing(spec, "the folder contains no *.tar file")
        return [Location(shard) for shard in shards]
    return list(itertools.chain.from_iterable(_expand_glob(one, spec) for one in _expand_braces(str(path))))


def _local_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        hint = f"file:///{parts.netloc.rpartition('@')[2]}{parts.path}, or the path itself"
        raise UsageError("a file:// URL cannot name another machine", where=without_secrets(url), hint=hint)
    return unquote(parts.path)


def _expand_glob(pattern: str, spec: str) -> list[Location]:
    if Path(pattern).is_file():
        return [Location(Path(pattern))]
    names = glob.glob(pattern)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    matches = sorted(Path(name) for name in names if Path(name).is_file() and not name.endswith(_SIDECARS))
    if not matches:
        raise _nothing(spec, "nothing matches" if pattern == spec else f"{pattern} does not exist")
    return [Location(path) for path in matches]


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
        raise UsageError("a brace range must be ascending", where=f"{{{inside}}}", hint=f"write {{{last}..{first}}}")
    if int(last) - int(first) >= _MAX_CHOICES:
        raise UsageError(f"a brace range names at most {_MAX_CHOICES} shards", where=f"{{{inside}}}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _nothing(spec: str, why: str) -> DataError:
    forms = (
        "name a tar file, a folder of tars (mmvit-data make creates one), "
        "a range like train-{00000..00012}.tar, or a glob like 'train-*.tar'"
    )
    near = "" if Path(spec).exists() or _BRACES.search(spec) else near_path(spec)
    return DataError(f"no shards found: {why}", where=spec, hint=f"{near} otherwise {forms}" if near else forms)
