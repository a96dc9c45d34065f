"""One process of a run that meets with a fault: python faulty_rank.py KIND RANK STEP PHASE ARGUMENT...; no test itself.

It is `python -m mmvit ARGUMENT...`, but the process of that rank does what KIND says when it comes to that phase of
that step. The fault lives in here alone: the loop tells a `Watch` each phase that it comes to, and is caught there.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mmvit.cli import main
from mmvit.train.safety.watch import Watch


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    while True:
        time.sleep(1000)


def no_memory() -> None:
    raise MemoryError("a batch of 1 TiB")


def leave() -> None:
    os._exit(0)


def fail() -> None:
    os._exit(1)


def kill_in_write() -> None:
    """Die when the data of the second file are to be brought to the disk."""
    write, calls = os.fsync, []

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) == 2:
            kill()
        write(file)

    os.fsync = fsync


FAULTS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (kill, freeze, sleep, no_memory, leave, fail, kill_in_write)
}
# What the process is told otherwise than the others, from the start. DATA is the folder of the config, OUT that of the
# run, and beside it lies one of a finished run.
ONE_SHARD = "data.train=[DATA/train-00000.tar]"
DIFFERENCES = {
    "other_seed": ["seed=77"],
    "fewer_steps": ["train.steps=3"],
    "other_out": ["out=OUT-new"],
    "other_data": [ONE_SHARD],
    "other_run": ["out=OUT-finished"],
    "spoiled_run": ["out=OUT-finished", ONE_SHARD],
}


def arm(kind: str, step: int, phase: str) -> None:
    at = Watch.at

    def faulty(self: Watch, at_step: int, at_phase: str, key: str = "") -> None:
        at(self, at_step, at_phase, key)
        if (at_step, at_phase) == (step, phase):
            os.write(2, f"fault: {kind}\n".encode())
            FAULTS[kind]()

    Watch.at = faulty  # type: ignore[method-assign]


def differ(settings: list[str]) -> None:
    out = next(each.partition("=")[2] for each in sys.argv if each.startswith("out="))
    data = str(Path(sys.argv[2]).parent)
    for setting in settings:
        name = setting.partition("=")[0] + "="
        sys.argv = [each for each in sys.argv if not each.startswith(name)]
        sys.argv.append(setting.replace("OUT", out).replace("DATA", data))


if __name__ == "__main__":
    kind, rank, step, phase = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sys.argv = ["mmvit", *sys.argv[5:]]
    if int(os.environ["RANK"]) == rank:
        if kind in DIFFERENCES:
            differ(DIFFERENCES[kind])
        else:
            arm(kind, step, phase)
    main()
