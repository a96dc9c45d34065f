"""Puts many faults into shards and tallies what becomes of the samples; broken promises are listed."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from accounts import (
    Account,
    TooLongError,
    account_in_webdataset,
    account_with_index,
    account_without_index,
    explained,
    time_limit,
)
from mutations import Fault, mutate
from seed_shards import Seed, make_seeds

from data_tools.tar import byte_file
from data_tools.tar import headers as tar_headers
from data_tools.tar.index import build_index, index_path

TIME_LIMIT_S = 20
PIECES = ((1 << 20, 1 << 16), (4096, 1024), (1024, 700))  # bytes read and searched at a time: borders everywhere


class Result(NamedTuple):
    """Counts by kind of fault and name, and what was promised and not kept."""

    counts: defaultdict[str, Counter[str]]
    broken: list[str]


def run_trials(numbers: Iterable[int], with_webdataset: bool = False) -> Result:
    """Make the fault of each number and account for the samples of its shard in each way of reading."""
    result = Result(defaultdict(Counter), [])
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        tar = Path(folder, "mutated.tar")
        seeds = make_seeds(Path(folder))
        indexes = {seed.name: _index(Path(folder, f"{seed.name}.tar")) for seed in seeds}
        whole = {seed.name: _whole_in_webdataset(seed, tar) if with_webdataset else set() for seed in seeds}
        for number in numbers:
            rng = random.Random(number)
            seed = rng.choice(seeds)
            fault = mutate(seed, rng)
            silent_rot = len(fault.data) == len(seed.data) and rng.random() < 0.5
            counts = result.counts[fault.kind]
            counts["trials"] += 1
            counts["samples"] += len(seed.samples)
            try:
                with time_limit(TIME_LIMIT_S), _small_pieces(number):
                    with_index = account_with_index(seed, fault, tar, indexes[seed.name], silent_rot)
                    without = account_without_index(seed, fault, tar)
            except (Exception, TooLongError) as error:
                result.broken.append(f"trial {number}, {seed.name}, {fault.kind}: {type(error).__name__}: {error}")
                continue
            broken = [*_broken(seed, fault, with_index), *_broken_without_index(seed, fault, without)]
            result.broken.extend(f"trial {number}, {seed.name}, {fault.kind}: {what}" for what in broken)
            _count(counts, "index", with_index)
            _count(counts, "scan", without)
            if with_webdataset:
                theirs, errors = account_in_webdataset(seed, fault, tar)
                lost = whole[seed.name] - set(theirs.intact)
                counts["wds lost"] += len(lost)
                counts["wds torn"] += len(whole[seed.name] & set(theirs.torn))
                counts["wds silent"] += len(lost) if not errors else 0
                counts["wds silent trials"] += bool(lost and not errors)
                counts["wds hangs"] += errors["TooLongError"]
    return result


def _index(tar: Path) -> bytes:
    os.utime(tar, ns=(10**18, 10**18))
    build_index(tar)
    return index_path(tar).read_bytes()


def _whole_in_webdataset(seed: Seed, tar: Path) -> set[str]:
    """Return the samples that it delivers intact of the whole shard: where members lie apart, it tears them anyway."""
    return set(account_in_webdataset(seed, Fault("none", seed.data, []), tar)[0].intact)


def _count(counts: Counter[str], way: str, account: Account) -> None:
    for name, keys in account._asdict().items():
        counts[f"{way} {name}"] += len(keys)


def _broken(seed: Seed, fault: Fault, account: Account) -> Iterator[str]:
    """Tell which promises of reading with an index are broken: every sample is delivered intact, or reported."""
    if account.untold:
        yield f"with the index, in silence: {account.untold}"
    if account.wrong:
        yield f"with the index, image and text of two samples: {account.wrong}"
    if fault.small and len(seed.samples) - len(account.intact) > 2:
        yield f"with the index, {len(seed.samples) - len(account.intact)} samples are lost"
    if lost := _before(seed, fault) - set(account.intact):
        yield f"with the index, samples are lost that lie before the fault: {lost}"


def _before(seed: Seed, fault: Fault) -> set[str]:
    """Return the samples that end before the first byte that was touched."""
    first = min(start for start, _ in fault.spans)
    return {key for key in seed.samples if all(stop <= first for _, stop in seed.span(key))}


def _broken_without_index(seed: Seed, fault: Fault, account: Account) -> Iterator[str]:
    untold = [key for key in account.untold if not explained(seed, fault, key, key in account.torn)]
    if untold:
        yield f"without an index, in silence: {untold}"
    if not fault.forged and len(lost := _before(seed, fault) - set(account.intact)) > 1:
        yield f"without an index, samples are lost that lie before the fault: {lost}"
    if account.wrong and not fault.forged:
        yield f"without an index, image and text of two samples: {account.wrong}"
    if fault.small and len(seed.samples) - len(account.intact) > 2:
        yield f"without an index, {len(seed.samples) - len(account.intact)} samples are lost"


@contextlib.contextmanager
def _small_pieces(number: int) -> Iterator[None]:
    before = byte_file.LocalFile.piece, tar_headers._CHUNK, tar_headers._SEARCH
    piece, search = PIECES[number % len(PIECES)]
    byte_file.LocalFile.piece, tar_headers._CHUNK, tar_headers._SEARCH = piece, piece, search
    try:
        yield
    finally:
        byte_file.LocalFile.piece, tar_headers._CHUNK, tar_headers._SEARCH = before
