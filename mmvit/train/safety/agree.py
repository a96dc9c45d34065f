"""Agreement between ranks: errors and stop requests of one rank reach all, so that none waits for a lost one."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from data_tools.core.errors import MmvitError, UsageError
from mmvit.train.safety.watch import Watch

MAX_DIFFERENCES, MAX_VALUE = 8, 80  # reported at once; characters of each

T = TypeVar("T")
Failure = MmvitError | OSError


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """Destroy the process group after the block, or after an error that all ranks raise.

    Otherwise connections that another rank closes can abort this process at exit, which changes its exit code.
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


def gather_errors(
    accelerator: Accelerator, mine: Sequence[Failure], stop_requested: bool
) -> tuple[list[Failure], bool]:
    """Return the errors of all ranks in order, and whether a stop was requested on any rank.

    It costs one small reduction per step; the errors themselves are gathered only if there are any.
    """
    if accelerator.num_processes == 1:
        return list(mine), stop_requested
    sums = accelerator.reduce(torch.tensor([len(mine), int(stop_requested)], device=accelerator.device), "sum").tolist()
    return gather_object(list(mine)) if sums[0] else [], bool(sums[1])


def on_all(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """Return the result of `call`; an error that a user can fix, on any rank, is raised on all ranks."""
    result, mine = list[T](), list[Failure]()
    try:
        result.append(call())
    except (MmvitError, OSError) as error:
        if isinstance(error, MmvitError) and not accelerator.is_main_process:
            error.where = ", ".join(filter(None, [f"rank {accelerator.process_index}", error.where]))
        mine.append(error)
    errors, _ = gather_errors(accelerator, mine, stop_requested=False)
    if errors:
        raise errors[0]
    return result[0]


def on_main(accelerator: Accelerator, call: Callable[[], T]) -> T | None:
    """Return the result of `call` on the main rank and None on the others, which wait for it.

    An error of `call` that a user can fix is raised on all ranks.
    """
    return on_all(accelerator, lambda: call() if accelerator.is_main_process else None)


@contextlib.contextmanager
def main_first(accelerator: Accelerator, watch: Watch, what: str) -> Iterator[None]:
    """Run the block on the main rank first, so that the other ranks find the files that it writes.

    They wait without a timeout. An error of the main rank that a user can fix is raised by all ranks.
    """
    errors = list[Failure]()
    with watch.patient(what):
        if accelerator.is_main_process:
            try:
                yield
            except (MmvitError, OSError) as error:
                errors.append(error)
        errors, _ = gather_errors(accelerator, errors, stop_requested=False)
    if errors:
        raise errors[0]
    if not accelerator.is_main_process:
        yield


def check_agreement(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """Compare data, step, config and versions between the ranks.

    Raises:
        UsageError: on all ranks, if a rank differs from the main one in any of the facts.
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
            "ranks were started with different configurations",
            where="\n    ".join(lines[:MAX_DIFFERENCES] + more),
            note="nothing was started",
            hint="start all ranks with the same command, and with an out= folder and data that all of them can read",
        )


def _short(value: str | None) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
