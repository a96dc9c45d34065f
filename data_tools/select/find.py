"""Which samples a file of keys names: lines of text, or the pairs of numbers that DataComp writes for its uids.

A line is `key`, `shard.tar/key` or `PATH/shard.tar/key`; empty lines count for nothing. A `.npy` file holds an array of
dtype `u8,u8`: the upper and the lower half of each uid, 32 hexadecimal digits that stand as "uid" in a sample's json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.select.write import Int64s, SampleTable
from data_tools.tar.find import find_keys
from data_tools.tar.index import ShardIndex
from data_tools.tar.reader import ShardReader

Uids = NDArray[np.bytes_]  # 16 bytes each


class NamedSamples(NamedTuple):
    """The numbers of the samples that a list names, rising, and the entries that name none."""

    chosen: Int64s
    unknown: list[str]


def find_samples(
    table: SampleTable, keys: Path, *, num_workers: int | None = None, engine: str = "local"
) -> NamedSamples:
    """Return the samples that the file `keys` names; a key that several shards have names all of these.

    Args:
        table: all samples.
        keys: text, or `.npy` with uids, for which the json of every sample is read.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        DataError: none of the keys is known.
        UsageError: the file cannot be read.
    """
    is_binary = keys.suffix == ".npy"
    named = _find_uids(table, keys, num_workers, engine) if is_binary else _find_lines(table, keys)
    if not named.unknown and not len(named.chosen):
        raise DataError("the list of keys is empty", where=str(keys), hint="give a key a line")
    if not len(named.chosen):
        raise DataError(
            f"none of the {len(named.unknown)} keys is in the shards, not even {named.unknown[0]!r}",
            where=str(keys),
            hint=f"keys look like {table.full_key(0)!r} or {table.key(0)!r}",
        )
    return named


def _find_lines(table: SampleTable, keys: Path) -> NamedSamples:
    try:
        lines = keys.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(keys, error) from error
    found = find_keys(table.indexes, (line.strip() for line in lines if line.strip()))
    chosen = [int(table.starts[shard]) + i for shard, i in found.places]
    return NamedSamples(np.array(chosen, np.int64), found.unknown)


def _find_uids(table: SampleTable, keys: Path, num_workers: int | None, engine: str) -> NamedSamples:
    wanted = _load_uids(keys)
    is_found = np.zeros(len(wanted), bool)
    chosen = []
    work = run_tasks(_read_uids, table.indexes, num_workers=num_workers, engine=engine)
    for shard, (samples, uids) in track(work, len(table.indexes), "reading uids"):
        places = np.searchsorted(wanted, uids).clip(max=len(wanted) - 1)
        same = wanted[places] == uids
        chosen.append(table.starts[shard] + samples[same])
        is_found[places[same]] = True
    unknown = [uid.ljust(16, b"\0").hex() for uid in wanted[~is_found].tolist()]  # numpy drops zeros at the end
    return NamedSamples(np.sort(np.concatenate(chosen)).astype(np.int64), unknown)


def _load_uids(keys: Path) -> Uids:
    """Return the uids in rising order, each once."""
    try:
        pairs = np.load(keys)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(keys, error) from error
    names = pairs.dtype.names or ()
    if pairs.ndim != 1 or not len(pairs) or [pairs.dtype[name] for name in names] != [np.uint64, np.uint64]:
        what = f"the list of uids is an array of {pairs.dtype}, shape {list(pairs.shape)}, instead of pairs u8,u8"
        raise UsageError(what, where=str(keys), hint='numpy.save(FILE, numpy.array(PAIRS, "u8,u8"))')
    halves = np.stack([pairs[name] for name in names], axis=1).astype(">u8")  # as bytes they sort as the numbers do
    return np.unique(halves.view("S16")[:, 0])


def _read_uids(index: ShardIndex) -> tuple[Int64s, Uids]:
    """Return the numbers of the samples of a shard that have a uid, and the uids."""
    reader = ShardReader([index])
    samples, uids = [], []
    for i in range(len(index)):
        try:
            uid = bytes.fromhex(json.loads(reader.fields(0, i, ["json"]).get("json", b"null"))["uid"])
        except (SampleError, ValueError, KeyError, TypeError):
            continue  # it has none, so that no list can name it
        if len(uid) == 16:
            samples.append(i)
            uids.append(uid)
    return np.array(samples, np.int64), np.array(uids, "S16")


def _unreadable(keys: Path, error: Exception) -> UsageError:
    hint = "give a text file with a key a line, or a .npy file with pairs u8,u8"
    return UsageError(f"the list of keys cannot be read: {error}", where=str(keys), hint=hint)
