"""Starting two processes of which one is faulty, and what is expected of each kind of fault."""

import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

from support.processes import Process, launch, launcher, start

PROGRAM = Path(__file__).with_name("faulty_rank.py")
TIMEOUT_S = 15  # of the run, for a process without progress
LIMIT_S = 60  # from the fault to the end of the last process

# What is told of a fault, for the rank R.
MESSAGES = {
    "kill": "rank R did not respond for",
    "kill_in_write": "rank R did not respond for",
    "leave": "rank R did not respond for",
    "fail": "rank R did not respond for",
    "freeze": "rank R did not respond for",
    "sleep": "rank R made no progress",
    "no_memory": "rank R ended with MemoryError",
}
# What is told of a difference, by all, and the exit code.
UNEVEN = {
    "other_seed": ("rank R: seed is 77, on rank 0 3", 2),
    "fewer_steps": ("rank R: train.steps is 3, on rank 0 8", 2),
    "other_out": ("rank R: out is", 2),
    "other_data": ("rank R: training data is", 2),
    "other_run": ("rank R: step is 20, on rank 0 0", 2),
    "spoiled_run": ("where: rank R, ", 4),
}


class Case(NamedTuple):
    """A fault: what befalls which process where; `launched` by accelerate, or started one by one."""

    kind: str
    rank: int
    step: int
    phase: str
    launched: bool = True

    def __str__(self) -> str:
        return f"{self.kind}-rank{self.rank}-step{self.step}-{self.phase}{'' if self.launched else '-alone'}"


class Outcome(NamedTuple):
    """How a faulty run ended."""

    codes: list[int]  # of the launcher, or of each process
    seconds: float  # from the fault on
    output: str


def run(case: Case, arguments: list[str], folder: Path) -> Outcome:
    """Run two processes with a fault to the end of both; kills what is left after the limit."""
    program = [str(PROGRAM), case.kind, str(case.rank), str(case.step), case.phase, *arguments]
    path = folder / "output.txt"
    if case.launched:
        processes = [start([*launcher(2, "--multi_gpu"), *program], path, ACCELERATE_USE_CPU="true")]
    else:
        processes = launch(2, program, lambda rank: path)
    seconds = wait(processes, path, frozen=None if case.launched or case.kind != "freeze" else case.rank)
    return Outcome([process.wait() for process in processes], seconds, path.read_text())


def wait(processes: list[Process], output: Path, frozen: int | None) -> float:
    """Wait for the end; returns the seconds since the fault. A frozen process without a launcher ends for nobody."""
    began, faulted = time.monotonic(), 0.0
    awaited = [process for rank, process in enumerate(processes) if rank != frozen]
    try:
        while any(process.poll() is None for process in awaited):
            now = time.monotonic()
            if not faulted and re.search("^fault: ", output.read_text(), re.MULTILINE):
                faulted = now
            if now - (faulted or began + LIMIT_S) > LIMIT_S:
                break
            time.sleep(0.05)
        return time.monotonic() - (faulted or began)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def complaints(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with the end of a faulty run: nothing, for a good one."""
    found = []
    if outcome.seconds > LIMIT_S:
        found.append(f"took {outcome.seconds:.0f} s")
    survivors = [
        code for rank, code in enumerate(outcome.codes) if case.launched or rank != case.rank or case.kind in UNEVEN
    ]
    message, code = UNEVEN.get(case.kind, (MESSAGES.get(case.kind, ""), 5))
    expected = 1 if case.launched else code
    if any(code != expected for code in survivors):
        found.append(f"exit codes {outcome.codes}")
    words = [message.replace("R", str(case.rank), 1)]
    if case.kind not in (*UNEVEN, "kill_in_write"):  # which happens beside later steps
        words += [f"rank {case.rank}, step {case.step}, "]
    found += [f"does not say {word!r}" for word in words if word not in outcome.output]
    return found
