"""Kills a run of two processes at random moments, again and again, and compares its end with one nobody disturbed.

    python tests/faults/kills.py 200 [--seed 0]

The run has everything that a state consists of: Muon beside AdamW, averaged weights, micro-batches, augmentation. After
each kill its newest checkpoint must be readable; the end must be equal by SHA-256. `pytest -m slow` takes 10 moments.
"""

import argparse
import contextlib
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a program it has the folder of this file alone

from support.processes import Process, launch

from mmvit.checkpoint import latest_checkpoint
from mmvit.train.record.run_log import read_log

NUM_PROCESSES = 2
LIMIT_S = 300.0
MOMENTS = ("start", "step", "save")
SETTINGS = (
    *("optim.ema_decay=0.9", "train.micro_batches=2", "train.log_every=1", "train.save_every=3", "train.timeout_s=30"),
    "data.stall_timeout_s=29",
    "train.spike_factor=null",  # so many steps at this rate leave a plateau with a leap of the gradient
    "curriculum=[{until: 0.5, image_size: 24, text_tokens: 8, patch_dropout: 0.25}, {until: 1}]",
)


def start(config: Path, out: Path, num_steps: int, num_processes: int = NUM_PROCESSES) -> list[Process]:
    """Start the processes of the run as a launcher does, each in a group of its own."""
    program = ["-m", "mmvit", "pretrain", str(config), f"out={out}", f"train.steps={num_steps}", *SETTINGS]
    one_thread = {"OMP_NUM_THREADS": "1"}
    return launch(num_processes, program, lambda rank: out.parent / f"output-{rank}.txt", one_thread)


def kill(processes: list[Process], ranks: list[int]) -> None:
    """Kill processes of the run with all that they started, and see the others end by themselves."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(processes[rank].pid, signal.SIGKILL)
    for process in processes:
        process.wait(LIMIT_S)


def wait_for_moment(moment: str, out: Path, processes: list[Process], chance: random.Random) -> None:
    """Return in the start-up, in a step, or while a checkpoint is written; or when a process has ended."""
    lines = len(read_log(out / "log.jsonl"))
    target = lines + chance.randint(1, 6)
    limit = time.monotonic() + (chance.uniform(0.5, 9) if moment == "start" else LIMIT_S)
    while time.monotonic() < limit and all(process.poll() is None for process in processes):
        come = moment != "start" and len(read_log(out / "log.jsonl")) >= target
        if come and (moment == "step" or any((out / "checkpoints").glob(".step-*"))):
            break
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))


def kill_often(config: Path, folder: Path, num_kills: int, num_steps: int, seed: int) -> Counter[str]:
    """Kill the run of `config` so many times and compare; returns what was met, raises AssertionError."""
    whole, run = folder / "undisturbed" / "run", folder / "killed" / "run"
    for process in start(config, whole, num_steps):
        assert process.wait(LIMIT_S) == 0, (whole.parent / "output-0.txt").read_text()
    chance, met = random.Random(seed), Counter[str]()
    for _ in range(num_kills):
        moment = chance.choice(MOMENTS)
        processes = start(config, run, num_steps)
        wait_for_moment(moment, run, processes, chance)
        assert not (run / "model").exists(), "the run has ended: it has too few steps for so many kills"
        ranks = [chance.randrange(2)] if chance.random() < 0.15 else [0, 1]  # the other one takes its time to give up
        kill(processes, ranks)
        met[moment] += 1
        met["one process alone"] += len(ranks) == 1
        saved = any((run / "checkpoints").glob("step-*"))
        checkpoint = latest_checkpoint(run)
        assert (checkpoint is not None) == saved, "no checkpoint of the run can be read"
        met["checkpoint readable"] += saved
        print(f"\r{sum(met[name] for name in MOMENTS)} kills, at step {checkpoint.step if checkpoint else 0}", end="")
    for process in start(config, run, num_steps):
        assert process.wait(LIMIT_S) == 0, (run.parent / "output-0.txt").read_text()
    assert_equal_ends(whole, run, num_steps)
    return met


def assert_equal_ends(whole: Path, run: Path, num_steps: int) -> None:
    """Compare two finished runs: all that is saved, and each step in the log once."""
    for name in (
        "model/model",
        *(f"checkpoints/step-{num_steps:08d}/{part}" for part in ("model", "optimizer", "ema")),
    ):
        digests = {hashlib.sha256((path / f"{name}.safetensors").read_bytes()).hexdigest() for path in (whole, run)}
        assert len(digests) == 1, f"{name} differs"
    assert [line["step"] for line in read_log(run / "log.jsonl")] == list(range(1, num_steps + 1))


def main() -> None:
    """Make data, kill and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder))
        met = kill_often(config, Path(folder), options.kills, 60 + 8 * options.kills, options.seed)
    told = ", ".join(f"{count} {name}" for name, count in met.items())
    print(f"\n{options.kills} kills ({told}): weights, optimizer and averages equal; {time.monotonic() - began:.0f} s")


def write_config(folder: Path) -> Path:
    """Write drawings of two vendors and a small config for them."""
    from data_tools.demo.emoji import EmojiOptions, write_emoji
    from data_tools.make.tokenizer import train_tokenizer
    from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer

    data = folder / "data"
    write_emoji(data, EmojiOptions(vendors=("Goog", "Sams"), languages=("en", "ko")))
    tokenizer = data / "tokenizer.json"
    names = [(data / f"names.{language}.txt").read_text(encoding="utf-8") for language in ("en", "ko")]
    train_tokenizer("".join(names).splitlines(), tokenizer, vocab_size=800)
    built = build_tokenizer(TokenizerConfig("file", str(tokenizer)), 24)
    path = folder / "config.yaml"
    template = (Path(__file__).parents[1] / "tiny.yaml").read_text()
    path.write_text(template.format(folder=data, vocab_size=built.vocab_size, end_of_text=built.end_of_text))
    return path


if __name__ == "__main__":
    main()
