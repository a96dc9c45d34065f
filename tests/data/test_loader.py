"""Batches prepared ahead are the same batches, and whatever keeps one from coming is named in time."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.core.errors import DataError, MmvitError, ResourceError, SampleError, UsageError
from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from data_tools.tar import reader as shard_reader
from mmvit.data import loader as loader_module
from mmvit.data.batches import Batch, BatchSplit, Teacher, TrainBatches
from mmvit.data.curriculum import Stage
from mmvit.data.loader import Interrupted, LoadedBatches, Loader, Prefetch, plan_prefetch
from mmvit.data.shards import IndexedShards
from mmvit.data.stored import StoredEmbeddings
from mmvit.layers.patch_embedding import Patches

BatchesOf = Callable[..., TrainBatches]
WriteSquares = Callable[..., list[Path]]


def assert_equal(first: Batch, second: Batch) -> None:
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)
    assert first.keys == second.keys
    assert [(error.shard, error.key) for error in first.bad] == [(error.shard, error.key) for error in second.bad]


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors of a batch, of its patches and of its teacher."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, tuple) else []


def take_until_error(loader: Loader) -> list[Batch | MmvitError]:
    found = []
    for batch in loader:
        found.append(batch)
        if isinstance(batch, MmvitError):
            return found
    raise AssertionError("no error came")


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_change_nothing(write_squares: WriteSquares, tmp_path: Path, batches_of: BatchesOf, num_workers: int):
    shards = IndexedShards(write_squares(tmp_path, broken=(3, 4, 10)))
    data = batches_of(shards, {"num_workers": num_workers})
    with Loader(data, range(3, 8)) as loader:
        found = list(loader)
    for step, batch in zip(range(3, 8), found, strict=True):
        assert isinstance(batch, Batch)
        assert_equal(batch, data[step])
    assert sum(len(batch.bad) for batch in found) >= 3


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["patches", "embeddings"])
def test_what_is_no_square_comes_through_workers_too(
    squares: IndexedShards, batches_of: BatchesOf, embedded_squares: Path, kind: str, num_workers: int
):
    own = {"patch_budget": 20} if kind == "patches" else {"image_embeddings": str(embedded_squares)}
    teacher = StoredEmbeddings(embedded_squares)
    data = batches_of(squares, own | {"num_workers": num_workers}, patch_size=4, teacher=teacher)
    with Loader(data, range(3)) as loader:
        for step, batch in enumerate(loader):
            assert type(batch.images) is (Patches if kind == "patches" else torch.Tensor)
            assert type(batch.teacher) is Teacher
            assert len(tensors(batch)) == (7 if kind == "patches" else 6)
            assert_equal(batch, data[step])


@pytest.mark.gpu
def test_all_of_a_batch_is_pinned(squares: IndexedShards, batches_of: BatchesOf, embedded_squares: Path):
    """Whatever is not would be copied to the device while the step waits."""
    teacher = StoredEmbeddings(embedded_squares)
    with Loader(batches_of(squares, {"patch_budget": 20}, patch_size=4, teacher=teacher), range(1)) as loader:
        (batch,) = loader
    assert len(tensors(batch)) == 7
    assert all(tensor.is_pinned() for tensor in tensors(batch))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stop_request_is_heard_while_no_batch_comes(
    write_squares: WriteSquares,
    serve: Callable[[Path], Any],
    tmp_path: Path,
    batches_of: BatchesOf,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
):
    monkeypatch.setattr(loader_module, "_STOP_S", 0.6)
    paths = write_squares(tmp_path / "shards")
    server = serve(tmp_path / "shards")
    shards = IndexedShards([f"{server.url}/{path.name}" for path in paths])
    server.fault = lambda path, times: "stall" if path == "/shard-00001.tar" else ""
    requested = threading.Event()
    data = batches_of(shards, {"num_workers": num_workers, "stall_timeout_s": 20.0}, batch_size=2)
    with Loader(data, range(11), requested.is_set) as loader:
        threading.Timer(1.0, requested.set).start()
        *found, error = take_until_error(loader)
    assert type(error) is Interrupted
    assert error.exit_code == 143
    assert requested.is_set()
    assert re.fullmatch(r"http.*/shard-00001.tar, key 'key\d+', for \d+ s", error.where)
    assert all(isinstance(batch, Batch) for batch in found)


def test_a_stop_request_takes_no_batch_that_comes(
    squares: IndexedShards, batches_of: BatchesOf, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loader_module, "_CHECK_S", 0.001)  # it is looked for many times while a batch is awaited
    with Loader(batches_of(squares, {"num_workers": 1}), range(3), lambda: True) as loader:
        assert all(isinstance(batch, Batch) for batch in loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_time_of_waiting_is_counted_and_the_sample_is_named(
    squares: IndexedShards, batches_of: BatchesOf, monkeypatch: pytest.MonkeyPatch, num_workers: int
):
    load = TrainBatches.load

    def slow(self: TrainBatches, number: int, note: Callable[[int], None]) -> Batch:
        time.sleep(0.2)
        return load(self, number, note)

    monkeypatch.setattr(TrainBatches, "load", slow)
    with Loader(batches_of(squares, {"num_workers": num_workers}), range(4)) as loader:
        assert loader.waited_s() == 0
        stream = iter(loader)
        first = next(stream)
        assert loader.waited_s() >= 0.2
        assert loader.waited_s() == 0
        last = list(stream)[-1]
        assert 0.55 <= loader.waited_s() < 20
        assert loader.reading() == last.keys[0] != first.keys[0]
        loader.loaded.reading[:] = [101, 1 + 5, time.monotonic()]
        assert loader.reading() == f"{squares.paths[0]}, key 'key5', for 0 s"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_is_given_in_place_of_its_batch(
    write_squares: WriteSquares, tmp_path: Path, batches_of: BatchesOf, num_workers: int
):
    paths = write_squares(tmp_path)
    data = batches_of(IndexedShards(paths), {"num_workers": num_workers}, batch_size=2)
    paths[1].unlink()
    with Loader(data, range(11)) as loader:
        found = list(loader)
    ids = data.order.epoch(0).reshape(11, 2)
    for pair, batch in zip(ids, found, strict=True):
        if ((pair >= 9) & (pair < 18)).any():  # one of them lies in the second shard
            assert isinstance(batch, DataError)
            assert not isinstance(batch, SampleError)
            assert (batch.where, batch.exit_code) == (str(paths[1]), 3)
        else:
            assert isinstance(batch, Batch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failing_system_is_told_in_words(
    squares: IndexedShards, batches_of: BatchesOf, monkeypatch: pytest.MonkeyPatch, num_workers: int
):
    def fail(place: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(shard_reader, "open_file", fail)
    data = batches_of(IndexedShards(squares.paths), {"num_workers": num_workers})
    with Loader(data, range(1)) as loader:
        (error,) = loader
    assert isinstance(error, ResourceError)
    assert "Too many open files" in error.what
    first = int(data.order.epoch(0)[0])
    assert error.where.startswith(f"{squares.paths[first // 9]}, key 'key{first}'")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_is_no_killed_worker(
    squares: IndexedShards, batches_of: BatchesOf, monkeypatch: pytest.MonkeyPatch, num_workers: int
):
    def load(self: TrainBatches, number: int, note: object) -> Batch:
        raise RuntimeError("a bug")

    monkeypatch.setattr(TrainBatches, "load", load)
    before = multiprocessing.active_children()
    loader = Loader(batches_of(squares, {"num_workers": num_workers}), range(1))
    with pytest.raises(RuntimeError, match="a bug"), loader:
        list(loader)
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_stalled_reader_is_named_and_left(
    write_squares: WriteSquares, serve: Callable[[Path], Any], tmp_path: Path, batches_of: BatchesOf, num_workers: int
):
    """The server takes requests for the second shard and never answers."""
    paths = write_squares(tmp_path / "shards")
    server = serve(tmp_path / "shards")
    shards = IndexedShards([f"{server.url}/{path.name}" for path in paths])
    server.fault = lambda path, times: "stall" if path == "/shard-00001.tar" else ""
    data = batches_of(shards, {"num_workers": num_workers, "stall_timeout_s": 1.0}, batch_size=2)
    order = data.order.epoch(0).tolist()
    stalled = next(i for i in order if 9 <= i < 18)
    start = time.monotonic()
    with Loader(data, range(11)) as loader:
        *found, error = take_until_error(loader)
        children = multiprocessing.active_children()
    assert time.monotonic() - start < 10
    assert all(isinstance(batch, Batch) for batch in found)
    assert len(found) == order.index(stalled) // 2
    assert isinstance(error, ResourceError)
    assert error.exit_code == 5
    assert error.what == "no batch came for 1 s: a data loader worker is stalled"
    where = re.fullmatch(r"(http.*tar), key 'key(.*)', for (\d+) s", error.where)
    assert where[1] == str(shards.paths[1])
    assert int(where[2]) == stalled or num_workers == 2  # two hang in this shard: one of them is named
    assert 1 <= int(where[3]) <= 8
    assert "data.stall_timeout_s" in error.hint
    assert len(children) == num_workers
    assert not any(is_alive(child.pid) for child in children)


def test_a_stopped_worker_cannot_hold_the_run(squares: IndexedShards, batches_of: BatchesOf):
    """As in a read that no signal interrupts: the workers do not end when they are asked to."""
    data = batches_of(squares, {"num_workers": 2}, batch_size=2)
    with Loader(data, range(1000)) as loader:
        assert isinstance(next(iter(loader)), Batch)
        loader.limit = 1.0
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, signal.SIGSTOP)
        start = time.monotonic()
        *_, error = take_until_error(loader)
    assert time.monotonic() - start < 8
    assert "worker is stalled" in error.what
    assert not any(is_alive(child.pid) for child in children)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_worker_is_told_when_a_batch_is_asked_for(
    squares: IndexedShards, batches_of: BatchesOf, num_workers: int
):
    data = batches_of(squares, {"num_workers": num_workers}, batch_size=2)
    with Loader(data, range(1000)) as loader:
        assert isinstance(next(iter(loader)), Batch)
        children = multiprocessing.active_children()
        victim = children[-1].pid
        os.kill(victim, signal.SIGKILL)
        os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
        torch.zeros(3).sum().item()  # the rest of the step: nothing is raised here
        start = time.monotonic()
        *_, error = take_until_error(loader)
        assert time.monotonic() - start < 5
    assert isinstance(error, ResourceError)
    assert error.what == "a worker was killed by SIGKILL"
    assert "fewer data.num_workers" in error.hint
    assert not any(is_alive(child.pid) for child in children)


def test_a_worker_killed_while_it_is_waited_for_is_told_at_once(squares: IndexedShards, batches_of: BatchesOf):
    data = batches_of(squares, {"num_workers": 1, "stall_timeout_s": 60.0}, batch_size=2)
    with Loader(data, range(1000)) as loader:
        assert isinstance(next(iter(loader)), Batch)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGSTOP)
        killer = threading.Timer(0.5, child.kill)
        killer.start()
        start = time.monotonic()
        *_, error = take_until_error(loader)
        assert time.monotonic() - start < 5
        killer.join()
    assert error.what == "a worker was killed by SIGKILL"


def test_a_sample_that_kills_its_worker_is_named(
    squares: IndexedShards, batches_of: BatchesOf, monkeypatch: pytest.MonkeyPatch
):
    read = IndexedShards.read

    def deadly(self: IndexedShards, i: int, **options: bool) -> object:
        if i == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, i, **options)

    monkeypatch.setattr(IndexedShards, "read", deadly)
    data = batches_of(squares, {"num_workers": 2}, batch_size=2)
    with Loader(data, range(11)) as loader:
        *_, error = take_until_error(loader)
    assert error.what == "a worker was killed by SIGKILL"
    assert error.where.startswith(f"{squares.paths[1]}, key 'key13', for ")


def test_a_shard_is_named_where_its_index_cannot_be_read(
    squares: IndexedShards, batches_of: BatchesOf, monkeypatch: pytest.MonkeyPatch
):
    hung = threading.Event()
    late = SampleError("damaged", "", shard="s", key="k")
    # Its disk does not answer.
    monkeypatch.setattr(IndexedShards, "error", lambda *arguments: hung.wait() and late)
    monkeypatch.setattr(loader_module, "_NAME_LIMIT_S", 0.05)
    loaded = LoadedBatches(batches_of(squares, {"num_workers": 1}))
    loaded.reading[:] = [101, 1 + 4, time.monotonic() - 20]
    assert loaded.last_read() == f"{squares.paths[0]}, for 20 s"
    hung.set()


def test_the_process_that_is_gone_is_asked_for(squares: IndexedShards, batches_of: BatchesOf):
    loaded = LoadedBatches(batches_of(squares, {"num_workers": 3}))
    now = time.monotonic()
    loaded.reading[:] = [101, 1 + 4, now - 20, 102, 1 + 5, now - 60, 103, 0, now - 90]  # the third reads nothing
    assert loaded.last_read() == f"{squares.paths[0]}, key 'key5', for 60 s"
    assert loaded.last_read([101, 103]) == f"{squares.paths[0]}, key 'key4', for 20 s"
    assert loaded.last_read([103]) == ""


def test_nobody_is_blamed_for_what_is_done(squares: IndexedShards, batches_of: BatchesOf):
    loaded = LoadedBatches(batches_of(squares))
    seen = []
    real = loaded.batches.source.read
    loaded.batches.source = SpyingShards(squares, lambda i, **_: (seen.append((i, loaded.last_read())), real(i))[1])
    assert isinstance(loaded[0], Batch)
    for i, where in seen:
        assert where == f"{squares.paths[i // 9]}, key 'key{i}', for 0 s"
    assert len(seen) == 8
    assert loaded.last_read() == ""


class SpyingShards:
    """Shards whose `read` is another."""

    def __init__(self, shards: IndexedShards, read: Callable[..., object]):
        self.shards, self.read = shards, read

    def __getattr__(self, name: str) -> object:
        return getattr(self.shards, name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(squares: IndexedShards, batches_of: BatchesOf, number: int):
    """Ctrl-C and many a batch system reach all processes of a group: the batches of the last step must still come."""
    data = batches_of(squares, {"num_workers": 2}, batch_size=2)
    with Loader(data, range(40)) as loader:
        stream = iter(loader)
        assert all(isinstance(next(stream), Batch) for _ in range(2))  # one of each worker: both have begun
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)
        assert all(isinstance(batch, Batch) for batch in stream)


MIB = 2**20
ITEM = 12 * MIB  # 16 images of 512 x 512


@pytest.mark.parametrize(
    ("num_workers", "prefetch_mb", "layout", "expected"),
    [
        (0, 2048, {}, Prefetch(0, 0, 0)),
        (2, 2048, {}, Prefetch(2, 4, 8 * ITEM)),
        (2, 96, {}, Prefetch(2, 4, 8 * ITEM)),
        (2, 95, {}, Prefetch(2, 3, 6 * ITEM)),
        (2, 24, {}, Prefetch(2, 1, 2 * ITEM)),
        (2, 23, {}, Prefetch(1, 1, ITEM)),
        (8, 60, {}, Prefetch(5, 1, 5 * ITEM)),
        (2, 1, {}, Prefetch(1, 1, ITEM)),  # less than one batch ahead is none
        (2, 24, {"split": BatchSplit(0, 2, 2)}, Prefetch(2, 4, 8 * ITEM // 4)),
    ],
)
def test_reading_ahead_is_bounded(
    squares: IndexedShards,
    batches_of: BatchesOf,
    num_workers: int,
    prefetch_mb: int,
    layout: dict[str, BatchSplit],
    expected: Prefetch,
):
    data = {"num_workers": num_workers, "prefetch_mb": prefetch_mb}
    plan = plan_prefetch(batches_of(squares, data, image_size=512, batch_size=16, **layout))
    assert plan == expected
    assert plan.size <= max(prefetch_mb * MIB, ITEM)


def test_what_a_batch_takes_is_known_ahead(squares: IndexedShards, batches_of: BatchesOf, embedded_squares: Path):
    stages = [Stage(0.5, image_size=8), Stage(1.0, image_size=32)]
    assert batches_of(squares, stages=stages).num_bytes == batches_of(squares, stages=stages)[39].images.nbytes
    assert batches_of(squares, stages=stages[:1]).num_bytes == batches_of(squares)[0].images.nbytes
    for own in ({"patch_budget": 20}, {"image_embeddings": str(embedded_squares)}):
        data = batches_of(squares, own, patch_size=4, split=BatchSplit(0, 2, 2))
        assert data.num_bytes == tensors(data[0].images)[0].nbytes


def test_no_more_is_read_ahead_than_planned(squares: IndexedShards, batches_of: BatchesOf):
    """Batches of 384 KiB, 5 of them fit: two for each worker."""

    class Numbers(list[int]):
        drawn = 0

        def __iter__(self) -> Iterator[int]:
            for number in list.__iter__(self):
                self.drawn += 1
                yield number

    counted = Numbers(range(20))
    data = batches_of(squares, {"num_workers": 2, "prefetch_mb": 2}, image_size=128)
    with Loader(data, counted) as loader:
        assert loader.prefetch == Prefetch(2, 2, 4 * 384 * 1024)
        counted.drawn = -1  # the loader itself goes over the numbers too
        next(iter(loader))
        assert counted.drawn == 1 + 4


def test_too_little_shared_memory_is_told_before_the_start(
    squares: IndexedShards, batches_of: BatchesOf, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "free")
    data = batches_of(squares, {"num_workers": 2}, image_size=512, batch_size=16)
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: usage(9 * ITEM))
    assert plan_prefetch(data).size == 8 * ITEM  # and the one in use
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes of this machine take as much each
        with pytest.raises(UsageError):
            plan_prefetch(data)
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: usage(64 * MIB))  # docker's default
    with pytest.raises(UsageError, match="64 MiB free, the loader needs 108 MiB") as caught:
        Loader(data, range(5))
    assert caught.value.exit_code == 2  # nothing was started
    assert "--shm-size" in caught.value.hint
    data.config.num_workers = 0
    assert plan_prefetch(data).size == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("width", "height", "decode"), [(500, 375, "fast"), (1600, 1200, "fast"), (1600, 1200, "exact")]
)
def test_memory_of_a_worker_is_bounded(tmp_path: Path, width: int, height: int, decode: str):
    """Batches of 256 x 224 px, made of photographs."""
    write_synthetic(tmp_path / "shards", SyntheticPhotos(width, height), num_shards=1, num_samples=256)
    program = Path(__file__).with_name("worker_memory.py")
    command = [sys.executable, str(program), str(tmp_path / "shards"), decode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    print({name: round(mib) for name, mib in found.items()})
    assert found["resident"] - found["torch alone"] <= 300
    assert found["private"] <= 300
