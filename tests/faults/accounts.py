"""What becomes of each sample of a mutated shard: with the index from before, without one, and in webdataset."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mutations import BLOCK, Fault
from seed_shards import Seed

from data_tools.core.errors import MmvitError, SampleError
from data_tools.tar.index import index_path
from mmvit.data.shards import IndexedShards

_REGION = re.compile(r"bytes (\d+) to (\d+) are lost")


class Account(NamedTuple):
    """Of the samples of the whole shard.

    Args:
        intact: delivered, byte for byte.
        told: not delivered, and reported by key, or by the stretch of the tar where it is.
        untold: neither: lost or changed in silence.
        wrong: delivered with the image of one sample and the text of another.
        torn: delivered with bytes or fields that are not those of the sample.
    """

    intact: list[str]
    told: list[str]
    untold: list[str]
    wrong: list[str]
    torn: list[str]


class TooLongError(BaseException):
    """Not an Exception, so that no handler takes it for one of the data's."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLongError in what takes longer."""

    def stop(*_: object) -> None:
        raise TooLongError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def account_with_index(seed: Seed, fault: Fault, tar: Path, index: bytes, silent_rot: bool) -> Account:
    """Put the fault into a shard that was indexed before; `silent_rot` leaves its time as it was."""
    mtime_ns = 10**18
    tar.write_bytes(fault.data)
    os.utime(tar, ns=(mtime_ns, mtime_ns if silent_rot else mtime_ns + 1))
    index_path(tar).write_bytes(index)
    return _account(seed, fault, tar, verify=silent_rot, regions=False)


def account_without_index(seed: Seed, fault: Fault, tar: Path) -> Account:
    """Let the damaged shard be the first that is seen of it."""
    tar.write_bytes(fault.data)
    index_path(tar).unlink(missing_ok=True)
    return _account(seed, fault, tar, verify=False, regions=True)


def _account(seed: Seed, fault: Fault, tar: Path, verify: bool, regions: bool) -> Account:
    try:
        shards = IndexedShards([tar], verify, require_caption=seed.name != "pictures")
    except MmvitError:  # refused as a whole: told
        return Account([], list(seed.samples), [], [], [])
    delivered: dict[str, dict[str, bytes]] = {}
    told = set()
    for i in range(len(shards)):
        key = shards.key(i).partition("/")[2]
        try:
            delivered[key] = shards.fields(i)
            shards.read(i)
        except SampleError as error:
            told.add(error.key)
    lost = shards.lost()
    told |= {error.key for error in lost}
    problems = shards.reader.indexes[0].problems()
    told |= {problem.key for problem in problems if problem.cause in ("missing-field", "unsafe")}
    if regions:
        stretches = [tuple(map(int, _REGION.search(error.what).groups())) for error in lost if not error.key]
        told |= {key for key in seed.samples if _is_in(seed, fault, key, stretches)}
    return _sorted(seed, delivered, told)


def _is_in(seed: Seed, fault: Fault, key: str, stretches: list[tuple[int, int]]) -> bool:
    """Return whether a sample stood where bytes are told to be lost."""
    slack = abs(len(fault.data) - len(seed.data)) + BLOCK
    spans = seed.span(key)
    return any(a - slack < stop and start < b + slack for a, b in spans for start, stop in stretches)


def _sorted(seed: Seed, delivered: Mapping[str, Mapping[str, bytes]], told: set[str]) -> Account:
    intact, untold, torn = [], [], []
    for key, fields in seed.samples.items():
        now = delivered.get(key)
        if now is not None and all(now.get(field) == data for field, data in fields.items()):
            intact.append(key)
            continue
        if now is not None and key not in told:
            torn.append(key)
        if key not in told:
            untold.append(key)
    reported = [key for key in seed.samples if key not in {*intact, *untold}]
    return Account(intact, reported, untold, _wrong(seed, delivered, told), torn)


def _wrong(seed: Seed, delivered: Mapping[str, Mapping[str, bytes]], told: set[str]) -> list[str]:
    """Return the samples with one sample's image and another's text."""
    owners = {data: key for key, fields in seed.samples.items() for data in fields.values()}
    wrong = []
    for key, fields in delivered.items():
        picture = next((owners.get(fields[field]) for field in ("jpg", "jpeg", "png", "webp") if field in fields), None)
        text = owners.get(fields.get("txt", b""))
        if key not in told and picture and text and picture != text:
            wrong.append(key)
    return wrong


def account_in_webdataset(seed: Seed, fault: Fault, tar: Path) -> tuple[Account, Counter[str]]:
    """Read the shard as most do, going on after errors; with it come the errors that were raised or handled."""
    import webdataset

    errors: Counter[str] = Counter()

    def note(error: BaseException) -> bool:
        errors[type(error).__name__] += 1
        return True

    tar.write_bytes(fault.data)
    delivered = {}
    try:
        with time_limit(2):
            for sample in webdataset.WebDataset([str(tar)], shardshuffle=False, handler=note, empty_check=False):
                delivered[sample["__key__"]] = {name: data for name, data in sample.items() if name[:2] != "__"}
    except (Exception, TooLongError) as error:  # what it raises in spite of the handler
        note(error)
    return _sorted(seed, delivered, set()), errors


def explained(seed: Seed, fault: Fault, key: str, is_torn: bool) -> bool:
    """Return whether nothing but an earlier index can show what became of a sample.

    That is so where valid headers or contents were put in place of others, where only the bytes of the sample's own
    members were touched, and where zeros from a header to the end look like the end of the tar.
    """
    if fault.forged:
        return True
    spans = seed.span(key)
    if any(not fault.data[start:].strip(b"\0") for start, _ in fault.spans):
        return all(stop > min(start for start, _ in fault.spans) for _, stop in spans[-1:])
    contents = [(extent.data, extent.stop) for extent in seed.extents if seed.key_of(extent) == key]
    return is_torn and any(a < stop and start < b for a, b in contents for start, stop in fault.spans)
