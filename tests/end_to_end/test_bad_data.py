"""Real runs on data that are damaged, vanish or hang: all processes agree on what happens, and none stays behind."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import Process, launch

from data_tools.tar.expand import expand_shards
from mmvit.checkpoint import latest_checkpoint
from mmvit.data.order import SampleOrder
from mmvit.data.shards import IndexedShards
from mmvit.train.record.run_log import read_log

LIMIT_S = 120  # for whatever is waited for
STEPS, BATCH_SIZE, SEED = 40, 24, 3
SETTINGS = (f"train.steps={STEPS}", f"train.batch_size={BATCH_SIZE}", "train.log_every=1", "train.save_every=7")
LOSS_TOLERANCE = 1e-4  # relative, in fp32: two processes add up in another order

SpoiledData = Callable[..., Path]
Start = Callable[..., list[Process]]


@pytest.fixture
def start(tiny_config: Path) -> Iterator[Start]:
    """Start the processes of a run, each in a group of its own; none outlives the test."""
    started: list[Process] = []

    def popen(out: Path, data: Path, *settings: str, world_size: int = 1, patch: str = "") -> list[Process]:
        program = ["-c", f"{patch}\nfrom mmvit.cli import main\nmain()"]
        named = {setting.partition("=")[0]: setting for setting in (*SETTINGS, *settings)}  # the later one counts
        command = [*program, "pretrain", str(tiny_config), f"out={out}", f"data.train=[{data}]", *named.values()]
        fp32 = {"MMVIT_BF16_UNITS": "0"}  # the same arithmetic on every machine
        started.extend(launch(world_size, command, lambda rank: errors_of(out, rank), fp32))
        return started[-world_size:]

    yield popen
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def errors_of(out: Path, rank: int = 0) -> Path:
    return out.with_name(f"{out.name}.errors{rank}")


def wait_until(condition: Callable[[], object], process: Process) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.001)


def num_steps(out: Path) -> int:
    return len(read_log(out / "log.jsonl"))


def group_is_gone(process: Process) -> bool:
    """Whether no process of the run is left; the group that it began outlives it with any of them."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def loaders_of(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def samples_of(data: Path) -> tuple[IndexedShards, list[int]]:
    """The shards and the order of the first epoch."""
    shards = IndexedShards(expand_shards(str(data)))
    return shards, SampleOrder(len(shards), SEED, shards.shard_sizes).epoch(0).tolist()


@pytest.mark.slow
def test_bad_samples_of_one_process_end_all(start: Start, spoiled_data: SpoiledData, tmp_path: Path):
    """Of two processes only the second meets them; 3 of 300 are allowed."""
    _, order = samples_of(spoiled_data(tmp_path / "whole", broken=(), max_samples=10))
    second = [order[step * BATCH_SIZE + BATCH_SIZE // 2 + i] for step in (3, 4) for i in (0, 5)]
    data = spoiled_data(tmp_path / "data", broken=second, max_samples=10)
    out = tmp_path / "run"
    processes = start(out, data, "data.num_workers=0", world_size=2)
    assert [process.wait(LIMIT_S) for process in processes] == [3, 3]
    first, other = (errors_of(out, rank).read_text() for rank in (0, 1))
    assert "Traceback" not in first + other
    message = first[first.index("mmvit: ") :]
    assert "mmvit: 4 invalid samples (4 bad-image)" in message
    assert other.endswith(message)
    assert latest_checkpoint(out).step == num_steps(out) == 4
    rows = read_log(out / "bad_samples.jsonl")
    shards, _ = samples_of(data)
    assert [(row["step"], row["shard"], row["key"]) for row in rows] == [
        (step, error.shard, error.key)
        for step, i in zip((4, 4, 5, 5), second, strict=True)
        for error in [shards.error("bad-image", "", i)]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_to_the_whole_group_stops_with_the_state_saved(
    start: Start, spoiled_data: SpoiledData, tmp_path: Path, number: signal.Signals
):
    """As Ctrl-C on a terminal, or a batch system: the loader processes get it too."""
    out = tmp_path / "run"
    (process,) = start(
        out, spoiled_data(tmp_path / "data", ()), "data.num_workers=2", "train.steps=5000", "train.save_every=5000"
    )
    wait_until(lambda: num_steps(out) >= 3, process)
    for _ in range(2):
        os.killpg(process.pid, number)
    assert process.wait(LIMIT_S) == 143
    errors = errors_of(out).read_text()
    assert errors.count("stopping after this step") <= 2  # not by the loader processes
    assert "Traceback" not in errors
    assert latest_checkpoint(out).step == num_steps(out) >= 3
    assert f"stopped at step {num_steps(out)} with the state saved" in errors
    assert group_is_gone(process)


HANG = """
import os, sys, time
from data_tools.tar.byte_file import LocalFile
read, count = LocalFile.read, 0
def hang(self, offset, size):
    global count
    count += 1
    if count == 80:
        open({fifo!r} + ".begun", "w").close()
        os.close(os.open({fifo!r}, os.O_RDONLY))  # nobody ever writes to it
    return read(self, offset, size)
LocalFile.read = hang
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_hanging_reader_is_named_and_the_program_ends(
    start: Start, spoiled_data: SpoiledData, tmp_path: Path, num_workers: int
):
    os.mkfifo(tmp_path / "fifo")
    data, out = spoiled_data(tmp_path / "data", ()), tmp_path / "run"
    settings = (f"data.num_workers={num_workers}", "data.stall_timeout_s=4")
    (process,) = start(out, data, *settings, patch=HANG.format(fifo=str(tmp_path / "fifo")))
    wait_until(lambda: num_steps(out) >= 2, process)  # of 24 samples each: the 80th read is of the fourth, for one
    began = time.monotonic()
    assert process.wait(LIMIT_S) == 5
    print(f"ended {time.monotonic() - began:.1f} s after step 2, limit 4 s")
    assert time.monotonic() - began < 4 + 8
    errors = errors_of(out).read_text()
    assert "mmvit: no batch came for 4 s: a data loader worker is stalled" in errors
    where = re.search(rf"where: {data}/train-0000.\.tar, key '(\S+)', for (\d+) s", errors)
    assert 4 <= int(where[2]) <= 8
    assert where[1] in keys_of(data)
    assert "Traceback" not in errors
    assert group_is_gone(process)


@pytest.mark.slow
def test_hanging_loader_process_ends_with_a_main_process_that_is_killed(
    start: Start, spoiled_data: SpoiledData, tmp_path: Path
):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (process,) = start(
        tmp_path / "run",
        spoiled_data(tmp_path / "data", ()),
        "data.num_workers=2",
        patch=HANG.format(fifo=str(fifo)),
    )
    wait_until(fifo.with_name("fifo.begun").exists, process)
    process.kill()
    process.wait(LIMIT_S)
    assert group_is_gone(process)


def keys_of(data: Path) -> list[str]:
    shards, _ = samples_of(data)
    return [shards.key(i).split("/")[1] for i in range(len(shards))]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_loader_process_is_told_by_all(start: Start, spoiled_data: SpoiledData, tmp_path: Path, world_size: int):
    data, out = spoiled_data(tmp_path / "data", ()), tmp_path / "run"
    processes = start(out, data, "data.num_workers=2", "train.steps=100000", world_size=world_size)
    wait_until(lambda: num_steps(out) >= 3, processes[0])
    loaders = loaders_of(processes[-1])
    assert len(loaders) == 2
    loaders[0].kill()
    began = time.monotonic()
    assert [process.wait(LIMIT_S) for process in processes] == [5] * world_size
    print(f"ended {time.monotonic() - began:.1f} s after the kill")
    assert time.monotonic() - began < 30
    for rank in range(world_size):
        errors = errors_of(out, rank).read_text()
        assert "mmvit: a worker was killed by SIGKILL" in errors
        assert "Traceback" not in errors
    assert all(group_is_gone(process) for process in processes)


@pytest.mark.slow
def test_shard_that_vanishes_for_one_process_ends_all(start: Start, spoiled_data: SpoiledData, tmp_path: Path):
    data, out = spoiled_data(tmp_path / "data", (), max_samples=10), tmp_path / "run"
    shards, order = samples_of(data)
    half = BATCH_SIZE // 2
    step = 8  # here the third block of ten shards begins, for both processes
    of_first, of_second = (
        {shards.place(i)[0] for i in order[step * BATCH_SIZE + start : step * BATCH_SIZE + start + half]}
        for start in (0, half)
    )
    early = {shards.place(i)[0] for i in order[: step * BATCH_SIZE]}
    gone = of_second - of_first - early
    processes = start(out, data, "data.num_workers=0", "train.steps=100", world_size=2)
    wait_until(lambda: num_steps(out) >= 1, processes[0])
    for shard in gone:
        shards.paths[shard].path.unlink()
    assert num_steps(out) < step, "the machine was too slow to unlink in time"
    assert [process.wait(LIMIT_S) for process in processes] == [3, 3]
    for rank in (0, 1):
        errors = errors_of(out, rank).read_text()
        assert "mmvit: the shard does not exist" in errors
        assert "Traceback" not in errors
    assert latest_checkpoint(out).step == num_steps(out) == step


@pytest.mark.slow
@pytest.mark.parametrize(("place", "code"), [("data/train-00001.tar.idx", 4), ("run/thesis.doc", 2)])
def test_what_the_first_process_refuses_ends_all(
    start: Start, spoiled_data: SpoiledData, tmp_path: Path, place: str, code: int
):
    """A damaged index, and a folder that is no run."""
    data = spoiled_data(tmp_path / "data", ())
    (tmp_path / "run").mkdir()
    (tmp_path / place).write_text("precious")
    processes = start(tmp_path / "run", data, world_size=2)
    assert [process.wait(LIMIT_S) for process in processes] == [code, code]
    first, other = (errors_of(tmp_path / "run", rank).read_text() for rank in (0, 1))
    assert first == other
    assert "Traceback" not in first
    assert str((tmp_path / place).parent) in first


@pytest.mark.slow
def test_evaluation_that_fails_ends_all(start: Start, spoiled_data: SpoiledData, tiny_data: Path, tmp_path: Path):
    """Only the first process evaluates."""
    pictures = spoiled_data(tmp_path / "val", range(300))
    names = f"zero_shot.class_names={tiny_data}/names.en.txt"
    evaluation = (f"zero_shot.data=[{pictures}/train-*.tar]", names, "zero_shot.every=2")
    processes = start(tmp_path / "run", spoiled_data(tmp_path / "data", ()), *evaluation, world_size=2)
    assert [process.wait(LIMIT_S) for process in processes] == [3, 3]
    for rank in (0, 1):
        errors = errors_of(tmp_path / "run", rank).read_text()
        assert "50 of 50 samples cannot be classified" in errors  # some of all, before the first step
        assert "Traceback" not in errors


@pytest.fixture
def undisturbed(start: Start, spoiled_data: SpoiledData, tmp_path: Path) -> Path:
    """A run whose every sixth sample is bad."""
    data, out = spoiled_data(tmp_path / "data", broken=range(0, 300, 6)), tmp_path / "undisturbed"
    (process,) = start(out, data, "data.max_bad_fraction=0.5")
    assert process.wait(LIMIT_S) == 0, errors_of(out).read_text()
    rows = read_log(out / "bad_samples.jsonl")
    assert len(rows) == 50  # in more than three epochs each was met
    assert read_log(out / "log.jsonl")[-1]["bad_causes"] == {"bad-image": 50}
    assert "50 invalid samples were replaced: 50 bad-image" in errors_of(out).read_text()
    return out


@pytest.mark.slow
def test_killed_runs_have_the_same_account(start: Start, undisturbed: Path, tmp_path: Path):
    """Loader processes end with a main process that is killed, whatever they are at."""
    rng, out, data = random.Random(0), tmp_path / "run", tmp_path / "data"
    for kill in range(6):
        before = num_steps(out)
        (process,) = start(out, data, "data.max_bad_fraction=0.5", "data.num_workers=2")
        reached = before + rng.randint(1, 6)
        wait_until(lambda reached=reached: num_steps(out) >= reached or (out / "model").exists(), process)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert process.wait(LIMIT_S) == -signal.SIGKILL
        assert group_is_gone(process), kill
    (process,) = start(out, data, "data.max_bad_fraction=0.5", "data.num_workers=0")
    assert process.wait(LIMIT_S) == 0
    assert_same(out, undisturbed)


def assert_same(out: Path, other: Path) -> None:
    for name in ("bad_samples.jsonl", "model/model.safetensors", f"checkpoints/step-{STEPS:08d}/optimizer.safetensors"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_have_the_account_and_losses_of_one(start: Start, undisturbed: Path, tmp_path: Path):
    """Also when they are killed and go on as one, and as two again."""
    settings, out, data = ("data.max_bad_fraction=0.5",), tmp_path / "run", tmp_path / "data"
    for kill, world_size in enumerate((2, 1, 2)):
        processes = start(out, data, *settings, f"data.num_workers={kill}", world_size=world_size)
        if kill < 2:
            wait_until(lambda kill=kill: num_steps(out) >= 13 * (kill + 1), processes[0])
            for process in processes:
                process.kill()
        for process in processes:
            assert process.wait(LIMIT_S) == (-signal.SIGKILL if kill < 2 else 0)
            assert group_is_gone(process)
    assert (out / "bad_samples.jsonl").read_bytes() == (undisturbed / "bad_samples.jsonl").read_bytes()
    one, two = (read_log(folder / "log.jsonl") for folder in (undisturbed, out))
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two, strict=True))
    print("largest relative difference of the loss:", worst)
    assert worst <= LOSS_TOLERANCE
    assert [line["bad_samples"] for line in one] == [line["bad_samples"] for line in two]
    assert json.dumps(one[-1]["bad_causes"]) == json.dumps(two[-1]["bad_causes"])
