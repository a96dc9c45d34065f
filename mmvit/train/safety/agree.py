"""What one process of a run finds, all know: so none waits for one that is gone."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from data_tools.core.errors import MmvitError, UsageError
from mmvit.train.safety.watch import Watch

MAX_DIFFERENCES, MAX_VALUE = 8, 80  # told at once; characters of each

T = TypeVar("T")
Failure = MmvitError | OSError


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """Leave the group of processes after the block, or after an error that all of them raise.

    Left to the end of the process, connections that another one closes abort it now and then, over its exit code.
    """
    agreed = False
    try:
        yield
        agreed = True
    except MmvitError:
        agreed = True
        raise
    finally:
        if agreed and dist.is_initialized():
            dist.destroy_process_group()


def gather_errors(accelerator: Accelerator, mine: Sequence[Failure], wished: bool) -> tuple[list[Failure], bool]:
    """Return the errors of all processes in the order of their ranks, and whether any process was asked to stop.

    One small reduction a step; the errors themselves travel only where there are any.
    """
    if accelerator.num_processes == 1:
        return list(mine), wished
    sums = accelerator.reduce(torch.tensor([len(mine), int(wished)], device=accelerator.device), "sum").tolist()
    return gather_object(list(mine)) if sums[0] else [], bool(sums[1])


def on_all(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """Return what `call` returns on this process; an error that a user can fix, on any of them, is raised by all."""
    result, mine = list[T](), list[Failure]()
    try:
        result.append(call())
    except (MmvitError, OSError) as error:
        if isinstance(error, MmvitError) and not accelerator.is_main_process:
            error.where = ", ".join(filter(None, [f"rank {accelerator.process_index}", error.where]))
        mine.append(error)
    errors, _ = gather_errors(accelerator, mine, wished=False)
    if errors:
        raise errors[0]
    return result[0]


def on_main(accelerator: Accelerator, call: Callable[[], T]) -> T | None:
    """Return what `call` returns on the main process, for which the others wait; None on those.

    An error of `call` that a user can fix is raised by all processes.
    """
    return on_all(accelerator, lambda: call() if accelerator.is_main_process else None)


@contextlib.contextmanager
def main_first(accelerator: Accelerator, watch: Watch, what: str) -> Iterator[None]:
    """Run the block on the main rank first, so that the other ranks find the files that it writes.

    They wait as long as it takes. An error of the main rank that a user can fix is raised by all ranks.
    """
    errors = list[Failure]()
    with watch.patient(what):
        if accelerator.is_main_process:
            try:
                yield
            except (MmvitError, OSError) as error:
                errors.append(error)
        errors, _ = gather_errors(accelerator, errors, wished=False)
    if errors:
        raise errors[0]
    if not accelerator.is_main_process:
        yield


def check_agreement(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """Compare what the processes are about to work on: data, step, config, versions.

    Raises:
        UsageError: on all processes, where one differs from the main one in any of the facts.
    """
    if accelerator.num_processes == 1:
        return
    of_main, *others = gather_object([facts])
    lines = [
        f"rank {rank}: {name} is {_short(theirs.get(name))}, on rank 0 {_short(fact)}"
        for rank, theirs in enumerate(others, 1)
        for name, fact in of_main.items()
        if theirs.get(name) != fact
    ]
    if lines:
        more = [f"and {len(lines) - MAX_DIFFERENCES} more"] if len(lines) > MAX_DIFFERENCES else []
        raise UsageError(
            "the processes of the run differ in what they are to do",
            where="\n    ".join(lines[:MAX_DIFFERENCES] + more),
            note="they would not train one model; nothing was started",
            hint="give all of them the same command, and an out= folder and data that all of them see",
        )


def _short(value: str | None) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
