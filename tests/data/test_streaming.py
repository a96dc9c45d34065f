"""Where shards cannot be read by offset they are streamed: the same samples, each once an epoch, the bad ones told."""

import gzip
import itertools
import logging
import os
import pickle
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.core.errors import DataError, MmvitError, ResourceError, SampleError, UsageError
from data_tools.tar.expand import expand_shards
from data_tools.tar.writer import ShardWriter
from mmvit.data.batches import Batch, TrainBatches
from mmvit.data.loader import Loader
from mmvit.data.shards import IndexedShards
from mmvit.data.source import RawSample, Reading
from mmvit.data.streaming import StreamedShards, open_shards, split_shards

NUM_SAMPLES = 22
SIZES = (9, 9, 4)

Serve = Callable[[Path], Any]
BatchesOf = Callable[..., TrainBatches]


@pytest.fixture
def server(tmp_path: Path, squares: IndexedShards, serve: Serve) -> Any:
    server = serve(Path(shutil.copytree(squares.paths[0].path.parent, tmp_path / "shards")))
    server.ranges = False
    return server


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mixing over the ends of epochs."""
    monkeypatch.setattr("mmvit.data.streaming._BUFFER", 1)


def open_stream(server: Any) -> StreamedShards:
    shards = open_shards(expand_shards(f"{server.url}/shard-{{00000..00002}}.tar"), announce=False)
    assert isinstance(shards, StreamedShards)
    return shards


def begin(shards: StreamedShards, first: int = 0, reader: int = 0, num_readers: int = 1) -> None:
    shards.begin(Reading(5, first, reader, num_readers), lambda shard: None)


def read(server: Any, count: int, first: int = 0, reader: int = 0, num_readers: int = 1) -> list[RawSample]:
    shards = open_stream(server)
    begin(shards, first, reader, num_readers)
    return [shards.read(0) for _ in range(count)]


def stream_batches(
    shards: StreamedShards, batches_of: BatchesOf, squares: IndexedShards, **changes: Any
) -> TrainBatches:
    like = batches_of(squares)
    for name, value in changes.pop("data", {}).items():
        setattr(like.config, name, value)
    settings = {"image_size": 16, "batch_size": 8, "num_steps": 40, "seed": 5} | changes
    return TrainBatches(shards, like.config, like.tokenizer, **settings)


def test_only_shards_without_ranges_are_streamed_and_the_log_says_so(server: Any, caplog: pytest.LogCaptureFixture):
    names = f"{server.url}/shard-{{00000..00002}}.tar?sig=t0ken"
    assert isinstance(open_shards(expand_shards(names)), StreamedShards)
    assert "order and resume are approximate" in caplog.text
    assert "t0ken" not in caplog.text
    caplog.clear()
    assert isinstance(open_shards(expand_shards(names), announce=False), StreamedShards)
    server.ranges = True
    with caplog.at_level(logging.WARNING):
        assert type(open_shards(expand_shards(names))) is IndexedShards
    assert caplog.text == ""


@pytest.mark.parametrize(("num_shards", "num_readers"), [*itertools.product((1, 2, 3, 7), (1, 2, 3, 4, 8, 9))])
def test_readers_part_the_samples_and_none_goes_idle(num_shards: int, num_readers: int):
    everything = Counter((shard, i) for shard in range(num_shards) for i in range(20))
    for epoch in range(3):
        parts = [split_shards(range(num_shards), epoch, reader, num_readers) for reader in range(num_readers)]
        assert all(parts)
        read = [(share.shard, i) for part in parts for share in part for i in range(share.part, 20, share.num_parts)]
        assert Counter(read) == everything
    if num_readers > num_shards:  # samples of a small shard reach every reader in time
        epochs = range(num_readers)
        assert 0 in [split_shards(range(num_shards), epoch, num_shards, num_readers)[0].part for epoch in epochs]


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_an_epoch_is_each_sample_once_as_it_is_stored(server: Any, squares: IndexedShards, num_readers: int):
    order = np.random.default_rng((5, 0, 0)).permutation(3).tolist()
    samples: list[RawSample] = []
    for reader in range(num_readers):
        shares = split_shards(order, 0, reader, num_readers)
        count = sum(len(range(share.part, SIZES[share.shard], share.num_parts)) for share in shares)
        samples += read(server, count, 0, reader, num_readers)
    assert sorted(samples) == sorted(squares.read(i) for i in range(NUM_SAMPLES))


def test_order_follows_from_seed_and_first_step_and_is_mixed(server: Any):
    keys = [sample.key for sample in read(server, 40)]
    assert keys == [sample.key for sample in read(server, 40)]
    assert keys != [sample.key for sample in read(server, 40, first=7)]
    assert len(set(keys)) > NUM_SAMPLES // 2
    assert len({key.split("/")[0] for key in keys[:9]}) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_indexed_shards_but_for_their_order(
    server: Any, squares: IndexedShards, batches_of: BatchesOf, num_workers: int
):
    data = {"num_workers": num_workers, "cache_mb": 10, "stall_timeout_s": 60.0}
    with Loader(stream_batches(open_stream(server), batches_of, squares, data=data), range(3, 9)) as loader:
        loaded = list(loader)
    plain = batches_of(squares)[0]
    keys: Counter[str] = Counter()
    for batch in loaded:
        assert isinstance(batch, Batch)
        assert batch.images.shape == plain.images.shape
        assert (batch.images.dtype, batch.ids.dtype, batch.groups.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert not batch.bad
        keys.update(batch.keys)
    assert keys.total() == 6 * 8
    assert len(keys) > NUM_SAMPLES // 2
    assert keys.keys() <= {squares.key(i) for i in range(NUM_SAMPLES)}
    groups = {key: tuple(row) for step in range(6) for key, row in zip(*_named(batches_of(squares)[step]), strict=True)}
    assert all(groups[key] == tuple(row) for batch in loaded for key, row in zip(*_named(batch), strict=True))


def _named(batch: Batch) -> tuple[list[str], list[list[int]]]:
    return batch.keys, batch.groups.tolist()


@pytest.mark.usefixtures("in_order")
def test_two_workers_read_different_shards(server: Any, squares: IndexedShards, batches_of: BatchesOf):
    shards = StreamedShards([f"{server.url}/shard-0000{i}.tar" for i in range(2)])
    batches = stream_batches(shards, batches_of, squares, data={"num_workers": 2}, batch_size=9)
    with Loader(batches, range(5, 17)) as loader:
        loaded = list(loader)
    for one, other in zip(loaded[::2], loaded[1::2], strict=True):
        assert len({*one.keys, *other.keys}) == 18


def test_changes_drawn_differ_each_time(server: Any, squares: IndexedShards, batches_of: BatchesOf):
    batches = stream_batches(open_stream(server), batches_of, squares, batch_size=44)
    batch = batches[0]
    pairs = [(key, image.numpy().tobytes()) for key, image in zip(batch.keys, batch.images, strict=True)]
    assert len(set(pairs)) > len({key for key, _ in pairs})


@pytest.mark.usefixtures("in_order")
def test_a_shard_is_mixed_and_a_later_start_takes_other_shards(server: Any):
    numbers = [int(sample.key.rpartition("key")[2]) for sample in read(server, 9)]
    assert numbers != sorted(numbers)
    orders = {tuple(dict.fromkeys(sample.key[:11] for sample in read(server, 22, first))) for first in range(5)}
    assert len(orders) > 1


def test_shards_may_be_sent_to_other_processes_and_are_known_by_name(server: Any):
    shards = pickle.loads(pickle.dumps(open_stream(server)))
    assert shards.paths == open_stream(server).paths
    assert shards.lost() == []
    assert shards.fingerprint() == open_stream(server).fingerprint() != StreamedShards(shards.paths[:2]).fingerprint()


def collect(server: Any, count: int) -> tuple[list[str], list[SampleError]]:
    shards = open_stream(server)
    begin(shards)
    keys, errors = [], []
    for _ in range(count):
        try:
            keys.append(shards.read(0).key)
        except SampleError as error:
            errors.append(error)
    return keys, errors


def test_a_damaged_header_costs_two_samples_which_are_told(server: Any):
    tar = server.folder / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"key12.png")
    data[at : at + 9] = b"\xff" * 9
    tar.write_bytes(data)
    keys, errors = collect(server, 150)
    assert len(set(keys)) >= NUM_SAMPLES - 2
    assert {error.cause for error in errors} == {"damaged"}
    assert {error.shard for error in errors} == {f"{server.url}/shard-00001.tar"}


@pytest.mark.parametrize("how", ["drop", "no length"])
def test_a_stream_that_ends_too_early_is_told(server: Any, how: str):
    with ShardWriter(server.folder, "large") as writer:
        for i in range(30):
            writer.write(f"large{i}", {"png": os.urandom(100_000), "txt": "x"})
    tar = writer.shards[0].rename(server.folder / "shard-00001.tar")
    if how == "drop":
        server.fault = lambda path, times: "drop" if "00001" in path else ""
    else:
        server.length = False
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    keys, errors = collect(server, 150)
    assert {error.cause for error in errors} == {"truncated"}
    assert {error.shard for error in errors} == {f"{server.url}/shard-00001.tar"}
    assert ("Not enough data" in errors[0].what) == (how == "drop")
    assert "large5" in {key.split("/")[1] for key in keys}  # what came is used
    assert "large15" not in {key.split("/")[1] for key in keys}


def test_a_stream_that_never_gets_far(server: Any):
    server.fault = lambda path, times: "drop"
    with pytest.raises(ResourceError, match=r"cannot be fetched: .*Not enough data"):
        read(server, 1)


@pytest.mark.usefixtures("in_order")
def test_a_stream_that_breaks_now_and_then_is_fetched_again(server: Any, squares: IndexedShards):
    server.fault = lambda path, times: "drop" if times % 3 else ""
    assert len({sample.key for sample in read(server, NUM_SAMPLES)}) == NUM_SAMPLES


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [("stall", ResourceError, "no response"), ("503", ResourceError, "503"), ("404", DataError, "does not exist")],
)
def test_a_failure_that_stays_ends_the_run(
    server: Any, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[MmvitError], what: str
):
    monkeypatch.setenv("MMVIT_REMOTE_TIMEOUT_S", "0.1" if fault == "stall" else "20")
    shards = open_stream(server)
    server.fault = lambda path, times: fault
    begin(shards)
    with pytest.raises(kind, match=what) as caught:
        shards.read(0)
    assert str(caught.value.where).startswith(f"{server.url}/shard-0000")


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stall_is_named_by_the_watchdog(server: Any, squares: IndexedShards, batches_of: BatchesOf, num_workers: int):
    last = np.random.default_rng((5, 0, 0)).permutation(3)[-1]
    shards = open_stream(server)
    server.fault = lambda path, times: "stall" if f"{last}.tar" in path else ""
    data = {"num_workers": num_workers, "stall_timeout_s": 1.0}
    with Loader(stream_batches(shards, batches_of, squares, data=data, batch_size=1), range(30)) as loader:
        *good, error = _until_error(loader)
    assert len(good) == NUM_SAMPLES - SIZES[last]
    assert isinstance(error, ResourceError)
    assert str(error.where).startswith(f"{server.url}/shard-0000{last}.tar, for")


def _until_error(loader: Loader) -> Iterator[object]:
    for batch in loader:
        yield batch
        if isinstance(batch, MmvitError):
            return


def test_a_shard_that_changes_under_a_stream(tmp_path: Path, write_squares: Callable[..., list[Path]]):
    tar = write_squares(tmp_path / "local")[0]
    shards = StreamedShards([tar])
    begin(shards)
    shards.read(0)
    data = tar.read_bytes()
    with tar.open("r+b") as file:
        file.write(data.replace(b"IDAT", b"XXXX"))
    with pytest.raises(SampleError, match="not as it was scanned") as caught:
        shards.read(0)
    assert caught.value.cause == "hash"
    assert caught.value.key.startswith("key")


def test_bad_samples_reach_the_batch(
    server: Any, write_squares: Callable[..., list[Path]], squares: IndexedShards, batches_of: BatchesOf
):
    server.folder = server.folder.parent / "broken"
    write_squares(server.folder, broken=(3, 12))
    batch = stream_batches(open_stream(server), batches_of, squares, batch_size=66)[0]
    assert {(error.cause, error.key) for error in batch.bad} == {("bad-image", "key3"), ("bad-image", "key12")}
    assert len(batch.keys) == 66
    assert not {key for key in batch.keys if key.endswith(("/key3", "/key12"))}


def test_compressed_and_empty_shards_are_refused(server: Any):
    tar = server.folder / "shard-00000.tar"
    for data, what in ((gzip.compress(tar.read_bytes()), "compressed"), (bytes(10240), "no sample")):
        for path in server.folder.glob("*.tar"):
            path.write_bytes(data)
        with pytest.raises(DataError, match=what):
            read(server, 1)


def test_nothing_is_left_in_the_temporary_folder(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    shards = open_stream(server)
    begin(shards)
    for _ in range(30):
        shards.read(0)
        assert not list((tmp_path / "spool").iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="cannot be stored"):
        read(server, 1)


def test_a_full_disk_is_named(server: Any):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ResourceError, match="cannot be stored") as caught:
            read(server, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "TMPDIR" in str(caught.value.hint)


def test_no_mixing_of_data_sets(server: Any, squares: IndexedShards, batches_of: BatchesOf):
    with pytest.raises(UsageError, match="streamed cannot be mixed"):
        stream_batches(open_stream(server), batches_of, squares, data={"weights": [1.0, 2.0]})


def test_webdataset_is_secured(server: Any):
    read(server, 1)
    assert os.environ["WDS_SECURE"] == "1"
