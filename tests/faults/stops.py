"""Stops runs by signals at random moments, again and again, and compares their ends with ones nobody disturbed.

    python tests/faults/stops.py 100 [--seed 0]

Half of the stops meet a run of one process and half one process of two. Half of them are followed by a second signal,
50 ms later. All processes must be gone in 30 s with exit code 143 and the last step saved. Before the first step, when
there is nothing to save, one ends by the signal, and the other one of two because it lost it. `pytest -m slow` takes 6
moments.
"""

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from kills import LIMIT_S, MOMENTS, assert_equal_ends, start, wait_for_moment, write_config
from support.processes import Process

from data_tools.core.errors import ResourceError
from data_tools.core.program import STOP_SIGNALS
from mmvit.checkpoint import latest_checkpoint
from mmvit.train.record.run_log import read_log

GONE_S = 30.0
JOINING_S = 30.0  # the train.timeout_s of the run
STOPPED = 143


def stop(processes: list[Process], chance: random.Random, told: bool) -> tuple[list[int], float]:
    """Send one signal or two and wait for the end; returns the exit codes and the seconds.

    A signal goes to one process of the run, or, as from a terminal, also to what that has started.
    """
    began = time.monotonic()
    for delay in (0, 0.05)[: chance.randint(1, 2) if told else 1]:
        time.sleep(delay)
        target, number = chance.choice(processes), chance.choice(STOP_SIGNALS)
        if target.poll() is None:
            chance.choice((os.kill, os.killpg))(target.pid, number)
    codes = [process.wait(LIMIT_S) for process in processes]
    return codes, time.monotonic() - began


def stop_often(
    config: Path, folder: Path, num_stops: int, num_steps: int, num_processes: int, seed: int
) -> tuple[Counter[str], float]:
    """Stop the run of `config` so many times and compare; returns what was met and the longest time, or raises."""
    whole, run = folder / "undisturbed" / "run", folder / "stopped" / "run"
    for process in start(config, whole, num_steps, num_processes):
        assert process.wait(LIMIT_S) == 0, (whole.parent / "output-0.txt").read_text()
    chance, met, slowest = random.Random(seed), Counter[str](), 0.0
    for _ in range(num_stops):
        before = _last_step(run)
        processes = start(config, run, num_steps, num_processes)
        wait_for_moment(chance.choice(MOMENTS), run, processes, chance)
        training = _last_step(run) > before
        codes, seconds = stop(processes, chance, training)
        slowest = max(slowest, seconds)
        outputs = [path.read_text() for path in run.parent.glob("output-*.txt")]
        checkpoint = latest_checkpoint(run)
        saved = checkpoint.step if checkpoint else 0
        if training and saved == num_steps:  # the last step was taken before the signal: the process may be at its end
            assert set(codes) <= {0, STOPPED, *(-number for number in STOP_SIGNALS)}, (codes, *outputs)
        elif training:
            assert set(codes) == {STOPPED}, (codes, *outputs)
            assert saved == _last_step(run), f"step {saved} is saved of {_last_step(run)}"
        else:
            assert set(codes) <= {STOPPED, 130, ResourceError.exit_code, *(-number for number in STOP_SIGNALS)}, codes
            assert saved >= before, f"step {saved} is saved of {before}"
        # A process whose partner is gone before they met waits for it as long as train.timeout_s says.
        assert seconds <= (GONE_S if training else GONE_S + JOINING_S), (seconds, *outputs)
        met["between steps" if training else "stopped in the first" if STOPPED in codes else "before the first"] += 1
    for process in start(config, run, num_steps, num_processes):
        assert process.wait(LIMIT_S) == 0, (run.parent / "output-0.txt").read_text()
    assert_equal_ends(whole, run, num_steps)
    return met, slowest


def _last_step(run: Path) -> int:
    lines = read_log(run / "log.jsonl")
    return lines[-1]["step"] if lines else 0


def main() -> None:
    """Make data, stop and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stops", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for num_processes, num_stops in ((1, options.stops - options.stops // 2), (2, options.stops // 2)):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            config, num_steps = write_config(Path(folder)), 30 + 6 * num_stops
            met, slowest = stop_often(config, Path(folder), num_stops, num_steps, num_processes, options.seed)
        told = ", ".join(f"{count} {name}" for name, count in met.items())
        print(
            f"{num_stops} stops of {num_processes} processes ({told}): no step lost, gone in {slowest:.1f} s or less, "
            f"weights, optimizer and averages equal; {time.monotonic() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
