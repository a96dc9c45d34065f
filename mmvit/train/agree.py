"""What one process of a run finds, all know: so none waits for one that is gone."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from data_tools.errors import MmvitError

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


def on_main(accelerator: Accelerator, call: Callable[[], T]) -> T | None:
    """Return what `call` returns on the main process, for which the others wait; None on those.

    An error of `call` that a user can mend is raised by all processes.
    """
    result, mine = None, list[Failure]()
    if accelerator.is_main_process:
        try:
            result = call()
        except (MmvitError, OSError) as error:
            mine.append(error)
    errors, _ = gather_errors(accelerator, mine, wished=False)
    if errors:
        raise errors[0]
    return result
