"""Starts two runs in one folder, again and again, kills the first, the second, both or none, and compares the end.

    python tests/faults/owners.py 50 [--seed 0]

The second start comes a random time after the first, with the same seed or another one, and kills come a random time
after that. A start ends with exit code 0 or killed, or with 2 because the folder is written by another process or holds
another run. What is left is run to its end: weights, optimizer and log must be equal to those of a run that had the
folder alone.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a program it has the folder of this file alone

from kills import LIMIT_S, write_config

import mmvit.train.loop  # noqa: F401 - before the first fork
from mmvit.cli import main as main_program
from mmvit.config import PretrainConfig, load_config
from mmvit.train.record.run_log import OF_THE_MACHINE, read_log

STEPS = 40
SETTINGS = (f"train.steps={STEPS}", "train.log_every=1", "train.save_every=3", "data.num_workers=1")
SEEDS = (1, 2)
KILLED = ((), (0,), (1,), (0, 1))  # of the two starts
OFFSET_S, KILL_S = 4.0, 5.0  # at most; a run takes about that long
REFUSED = 2


class Forked:
    """The program `mmvit` in a process of its own: forked, which saves the imports of a start."""

    def __init__(self, arguments: Sequence[str], output: Path):
        output.parent.mkdir(parents=True, exist_ok=True)
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            with output.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ["mmvit", *arguments]
            code: object = 1
            try:
                main_program()
            except SystemExit as end:
                code = end.code
            finally:
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 0 if code is None else 1)

    def wait(self) -> int:
        """Wait for the end and return the exit code; that of a killed one is negative."""
        limit = time.monotonic() + LIMIT_S
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < limit, "waited too long"
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        """Kill -9 the process alone, unless it has ended; its workers live on for a moment."""
        if self.code is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(self.pid, signal.SIGKILL)


def start_run(config: Path, out: Path, seed: int, output: Path) -> Forked:
    """Start a run in the folder."""
    return Forked(["pretrain", str(config), f"out={out}", f"seed={seed}", *SETTINGS], output)


def result(run: Path) -> list[object]:
    """Return what must not depend on other starts: the bytes of weights and optimizer, and the log."""
    names = ("model/model", f"checkpoints/step-{STEPS:08d}/model", f"checkpoints/step-{STEPS:08d}/optimizer")
    digests = [hashlib.sha256((run / f"{name}.safetensors").read_bytes()).hexdigest() for name in names]
    lines = [{key: line[key] for key in line if key not in OF_THE_MACHINE} for line in read_log(run / "log.jsonl")]
    return [*digests, *lines]


def interleave(config: Path, folder: Path, chance: random.Random) -> Counter[str]:
    """Start twice, kill, and run to the end what is left; returns what was met, raises AssertionError."""
    run, seeds = folder / "run", (chance.choice(SEEDS), chance.choice(SEEDS))
    killed, met = chance.choice(KILLED), Counter[str]()
    first = start_run(config, run, seeds[0], folder / "output-0.txt")
    time.sleep(chance.uniform(0, OFFSET_S))
    second = start_run(config, run, seeds[1], folder / "output-1.txt")
    starts = (first, second)
    for number in chance.sample(killed, len(killed)):
        time.sleep(chance.uniform(0, KILL_S / len(killed)))
        starts[number].kill()
    for number, process in enumerate(starts):
        code, output = process.wait(), (folder / f"output-{number}.txt").read_text()
        other = starts[1 - number].pid
        assert code in (0, REFUSED, -signal.SIGKILL), output
        met[{0: "finished", REFUSED: "refused", -signal.SIGKILL: "killed"}[code]] += 1
        if code == REFUSED:
            named = f"written by process {other} on " in output
            assert named or ("the folder contains another run" in output and seeds[0] != seeds[1]), output
            met["refused by name of the owner"] += named
        assert "Traceback" not in output, output
    seed = seeds[0]
    if (run / "config.yaml").exists():
        seed = load_config(PretrainConfig, run / "config.yaml").seed
    last = start_run(config, run, seed, folder / "output-2.txt")
    assert last.wait() == 0, (folder / "output-2.txt").read_text()
    met[f"seed {seed} at the end, {'same' if seeds[0] == seeds[1] else 'other'} seed"] += 1
    assert load_config(PretrainConfig, run / "config.yaml").seed == seed
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")], "something is left"
    return met


def interleave_often(config: Path, folder: Path, num_trials: int, seed: int) -> Counter[str]:
    """Interleave so many times and compare each end with that of a lone run."""
    alone = {}
    for each in SEEDS:
        run = folder / f"alone-{each}"
        process = start_run(config, run, each, folder / f"alone-{each}.txt")
        assert process.wait() == 0, (folder / f"alone-{each}.txt").read_text()
        alone[each] = result(run)
    chance, met = random.Random(seed), Counter[str]()
    for number in range(num_trials):
        trial = folder / f"trial-{number}"
        met += interleave(config, trial, chance)
        run = trial / "run"
        assert result(run) == alone[load_config(PretrainConfig, run / "config.yaml").seed], f"trial {number} differs"
        print(f"\r{number + 1} of {num_trials}", end="", flush=True)
    return met


def main() -> None:
    """Make data, interleave and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder))
        met = interleave_often(config, Path(folder), options.trials, options.seed)
    told = ", ".join(f"{count} {name}" for name, count in sorted(met.items()))
    print(
        f"\n{options.trials} interleavings ({told}): nothing mixed, weights, optimizer and log equal to lone runs; "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
