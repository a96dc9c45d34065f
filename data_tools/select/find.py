"""Finds the samples listed in a file of keys: lines of text, or the uid arrays of DataComp.

A line is `key`, `shard.tar/key` or `PATH/shard.tar/key`; empty lines are ignored. A `.npy` file contains an array of
dtype `u8,u8`: the upper and the lower half of each uid, 32 hexadecimal digits stored as "uid" in a sample's json.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.sample.content import FaultError, read_metadata
from data_tools.select.write import Int64s, SampleTable
from data_tools.tar.find import find_keys
from data_tools.tar.index import ShardIndex
from data_tools.tar.reader import ShardReader

Uids = NDArray[np.bytes_]  # 16 bytes each


class NamedSamples(NamedTuple):
    """The sample numbers for a list of keys, ascending, and the keys that match no sample."""

    chosen: Int64s
    unknown: list[str]


def find_samples(
    table: SampleTable, keys: Path, *, num_workers: int | None = None, engine: str = "local"
) -> NamedSamples:
    """Return the samples listed in the file `keys`; a key that occurs in several shards selects all of them.

    Args:
        table: all samples.
        keys: text file, or `.npy` with uids, for which the json of every sample is read.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        DataError: no key matches a sample.
        UsageError: the file cannot be read.
    """
    is_binary = keys.suffix == ".npy"
    named = _find_uids(table, keys, num_workers, engine) if is_binary else _find_lines(table, keys)
    if not named.unknown and not len(named.chosen):
        raise DataError("the list of keys is empty", where=str(keys), hint="write one key per line")
    if not len(named.chosen):
        raise DataError(
            f"none of the {len(named.unknown)} keys is in the shards, for example {named.unknown[0]!r}",
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
    """Return the unique uids in ascending order."""
    try:
        pairs = np.load(keys)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(keys, error) from error
    names = pairs.dtype.names or ()
    if pairs.ndim != 1 or not len(pairs) or [pairs.dtype[name] for name in names] != [np.uint64, np.uint64]:
        what = f"the list of uids is an array of {pairs.dtype}, shape {list(pairs.shape)}, instead of pairs u8,u8"
        raise UsageError(what, where=str(keys), hint='numpy.save(FILE, numpy.array(PAIRS, "u8,u8"))')
    halves = np.stack([pairs[name] for name in names], axis=1).astype(">u8")  # big-endian bytes sort like the numbers
    return np.unique(halves.view("S16")[:, 0])


def _read_uids(index: ShardIndex) -> tuple[Int64s, Uids]:
    """Return the numbers of the samples of a shard that have a uid, and their uids."""
    reader = ShardReader([index])
    samples, uids = [], []
    for i in range(len(index)):
        try:
            uid = bytes.fromhex((read_metadata(reader.fields(0, i, ["json"])) or {})["uid"])
        except (SampleError, FaultError, ValueError, KeyError, TypeError):
            continue  # it has no uid, so no list can contain it
        if len(uid) == 16:
            samples.append(i)
            uids.append(uid)
    return np.array(samples, np.int64), np.array(uids, "S16")


def _unreadable(keys: Path, error: Exception) -> UsageError:
    hint = "use a text file with one key per line, or a .npy file with pairs u8,u8"
    return UsageError(f"the list of keys cannot be read: {error}", where=str(keys), hint=hint)
