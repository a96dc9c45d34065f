"""A run that is killed or stopped, and run again each time, ends with the very bytes of one that nobody disturbed."""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import processes
from support.processes import Process

from data_tools.core.ownership import owned
from mmvit.train.record.run_log import OF_THE_MACHINE, read_log

STEPS = 36
SETTINGS = (f"train.steps={STEPS}", "train.log_every=1", "train.save_every=3", "data.max_bad_fraction=0.5")
LIMIT_S = 120  # for whatever is waited for
MOMENTS = ("start", "step", "save")

Start = Callable[[Path], Process]


@pytest.fixture(scope="module")
def start(
    tiny_config: Path,
    spoiled_data: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Start]:
    """Start the run in a process of its own, which does not outlive the tests; every fifth sample is bad."""
    started = []
    data = spoiled_data(tmp_path_factory.mktemp("data"), broken=range(0, 300, 5))
    settings = (f"data.train=[{data}]", *SETTINGS)

    def popen(out: Path) -> Process:
        command = [sys.executable, "-m", "mmvit", "pretrain", str(tiny_config), f"out={out}", *settings]
        started.append(processes.start(command, out.parent / "errors.txt"))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(out).wait(LIMIT_S) == 0
    return out


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_equal_runs(run: Path, other: Path) -> None:
    assert (run / "bad_samples.jsonl").read_bytes() == (other / "bad_samples.jsonl").read_bytes()
    for name in ("model/model.safetensors", *(f"checkpoints/step-{STEPS:08d}/{n}.safetensors" for n in TENSORS)):
        assert sha256(run / name) == sha256(other / name), name
    lines = [read_log(folder / "log.jsonl") for folder in (run, other)]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))  # each step once
    assert [computed(line) for line in lines[0]] == [computed(line) for line in lines[1]]
    left = [path.name for path in (run / "checkpoints").iterdir()]
    assert sorted(left) == [f"step-{STEPS - 3:08d}", f"step-{STEPS:08d}"]


def computed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in OF_THE_MACHINE}


TENSORS = ("model", "optimizer")


def num_steps(run: Path) -> int:
    lines = read_log(run / "log.jsonl")
    return lines[-1]["step"] if lines else 0


def unfinished_saves(run: Path) -> set[Path]:
    return set((run / "checkpoints").glob(".step-*")) if (run / "checkpoints").exists() else set()


def wait_until(condition: Callable[[], bool], process: Process) -> None:
    """Wait for the condition, and fail where the process ends or the limit passes first."""
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.0005)


def kill_at(moment: str, rng: random.Random, process: Process, run: Path) -> str:
    """Kill -9 about the moment, a random time after it came; returns where the kill landed."""
    before, garbage = num_steps(run), unfinished_saves(run)
    reached = before + rng.randint(1, 3)
    if moment == "start":
        deadline = time.monotonic() + rng.uniform(0, 4)
        wait_until(lambda: time.monotonic() > deadline or num_steps(run) != before, process)
    elif moment == "step":
        deadline = rng.uniform(0, 0.02)
        wait_until(lambda: num_steps(run) >= reached, process)
        time.sleep(deadline)
    else:
        wait_until(lambda: bool(unfinished_saves(run) - garbage), process)
        time.sleep(rng.uniform(0, 0.005))
    process.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    if unfinished_saves(run) - garbage:
        return "save"
    return "step" if num_steps(run) > before else "start"


@pytest.mark.parametrize(
    ("num_kills", "seed"), [(3, 0), pytest.param(10, 1, marks=pytest.mark.slow)], ids=["3 kills", "10 kills"]
)
def test_killed_run_ends_with_the_same_bytes(
    start: Start, undisturbed: Path, tmp_path: Path, num_kills: int, seed: int, record_property: Callable[..., None]
):
    rng = random.Random(seed)
    moments = list(itertools.islice(itertools.cycle(MOMENTS), num_kills))
    rng.shuffle(moments)
    run = tmp_path / "run"
    landed = Counter(kill_at(moment, rng, start(run), run) for moment in moments)
    print("kills landed in:", dict(landed))
    record_property("landed", dict(landed))
    assert start(run).wait(LIMIT_S) == 0
    assert_equal_runs(run, undisturbed)


def test_stopped_run_saves_its_state_and_goes_on(start: Start, undisturbed: Path, tmp_path: Path):
    run = tmp_path / "run"
    process = start(run)
    wait_until(lambda: num_steps(run) >= 10, process)
    os.killpg(process.pid, signal.SIGTERM)  # as a batch system does: the loader process gets it too
    os.killpg(process.pid, signal.SIGINT)  # a second one does no damage
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(LIMIT_S) == 143
    stopped_at = num_steps(run)
    assert 10 <= stopped_at < STEPS
    assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step-{stopped_at:08d}"  # no step is lost
    assert f"stopped at step {stopped_at} with the state saved" in (tmp_path / "errors.txt").read_text()
    assert start(run).wait(LIMIT_S) == 0
    assert_equal_runs(run, undisturbed)


@pytest.mark.slow
def test_run_whose_terminal_is_closed_saves_its_state(tiny_config: Path, tmp_path: Path):
    main, terminal = os.openpty()
    command = [sys.executable, "-m", "mmvit", "pretrain", str(tiny_config), f"out={tmp_path / 'run'}", *SETTINGS]
    session = "import os, sys, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY)"
    begin = f"{session}; os.execv(sys.argv[1], sys.argv[1:])"  # with the terminal as that of the session
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen([sys.executable, "-c", begin, *command, "data.num_workers=2"], **streams)
    os.close(terminal)
    shown = b""
    while b"step 10/" not in shown.replace(b"\x1b[0m", b"") and num_steps(tmp_path / "run") < 10:
        shown += os.read(main, 1 << 16)
    os.close(main)  # the kernel sends SIGHUP to all processes of the session, and writing to the terminal fails
    assert process.wait(LIMIT_S) == 143
    stopped_at = num_steps(tmp_path / "run")
    assert 10 <= stopped_at < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped_at:08d}").exists()


@pytest.mark.slow
def test_all_ranks_of_a_second_start_are_refused(tiny_config: Path, tmp_path: Path):
    run = tmp_path / "run"
    program = ["-m", "mmvit", "pretrain", str(tiny_config), f"out={run}"]
    with owned(run):
        before = {path: path.read_bytes() for path in run.iterdir()}
        ranks = processes.launch(2, program, lambda rank: tmp_path / f"output-{rank}.txt")
        assert [rank.wait(LIMIT_S) for rank in ranks] == [2, 2]
        assert {path: path.read_bytes() for path in run.iterdir()} == before
    for rank in range(2):
        assert f"written by process {os.getpid()}" in (tmp_path / f"output-{rank}.txt").read_text()
