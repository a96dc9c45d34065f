"""Runs a function on many independent tasks: in this process, in local processes, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data_tools.core.errors import ResourceError, UsageError, did_you_mean

Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local", "ray")

_HOST_AND_PORT = re.compile(r"([^/\[\]]+)\]?:(\d+)$")


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, num_workers: int | None = None, engine: str = "local"
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the task, its result) in order of completion; the first error cancels the rest.

    `function` and the tasks must be picklable: a module-level function, or a `functools.partial` of one, whose
    arguments are sent once per worker instead of once per task; tasks of plain values.

    Args:
        function: called with each task. Ray calls it again if a machine is lost, so it must be repeatable.
        tasks: arguments of the calls.
        num_workers: number of processes; None uses one per core (of the cluster), and 1 (or a single task) runs in this
            process.
        engine: "local", or "ray" (needs `pip install mmvit[ray]`): the cluster at RAY_ADDRESS, or one that is started
            on this machine for the call. Files must have the same paths on each machine.

    Raises:
        ResourceError: a worker was killed.
        UsageError: the engine is unknown, or Ray is not installed or cannot be reached.
    """
    if engine not in ENGINES:
        hint = did_you_mean(engine, ENGINES) or f"choose from: {' '.join(ENGINES)}"
        raise UsageError(f"unknown engine {engine!r}", hint=hint)
    if engine == "ray":
        yield from _run_on_ray(function, tasks, num_workers)
        return
    num_workers = min(num_workers or os.cpu_count() or 1, len(tasks))
    if num_workers <= 1:
        yield from ((i, function(task)) for i, task in enumerate(tasks))
        return
    # spawn, because a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_keep, initargs=(function,)) as pool:
        with _ctrl_c(signal.SIG_BLOCK, signal.SIG_UNBLOCK):  # workers started here inherit the blocked signal
            futures = {pool.submit(_call_kept, task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise _lost_worker("a worker process") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_kept: list[Callable[[Any], Any]] = []


def _keep(function: Callable[[Any], Any]) -> None:
    _kept[:] = [function]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit this worker when its parent process is killed: otherwise it would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call_kept(task: Any) -> Any:
    with _ctrl_c(signal.SIG_UNBLOCK, signal.SIG_BLOCK):  # it interrupts a task; idle workers are stopped by the parent
        return _kept[0](task)


@contextlib.contextmanager
def _ctrl_c(during: int, after: int) -> Iterator[None]:
    """Block or unblock the interrupt signal; a blocked signal is delivered once unblocked."""
    try:
        signal.pthread_sigmask(during, [signal.SIGINT])
        yield
    finally:
        signal.pthread_sigmask(after, [signal.SIGINT])


def _run_on_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int | None
) -> Iterator[tuple[int, Result]]:
    ray = _import_ray()
    was_there = ray.is_initialized()
    try:
        if not was_there:
            _connect(ray, num_workers)
        remote = ray.remote(lambda task: function(task))  # exported once and cached by each worker
        # Two tasks per worker keep it busy; more would only use memory of this process.
        most = num_workers or max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, int] = {}
        for i, task in enumerate(tasks):
            if len(running) == most:
                yield _next_result(ray, running)
            running[remote.remote(task)] = i
        while running:
            yield _next_result(ray, running)
    finally:
        if not was_there:
            ray.shutdown()


def _next_result(ray: Any, running: dict[Any, int]) -> tuple[int, Any]:
    """Wait for any of the running tasks and return its result; its error is raised as the function raised it."""
    (done,), _ = ray.wait(list(running), num_returns=1)
    try:
        return running.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        raise _lost_worker("a Ray worker") from error


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default, to avoid its warning
    try:
        import ray
    except ImportError:
        raise UsageError("the package ray is not installed", hint='pip install "mmvit[ray]"') from None
    return ray


def _connect(ray: Any, num_workers: int | None) -> None:
    address = os.environ.get("RAY_ADDRESS")
    local = address in (None, "", "local")
    try:
        if not local and (place := _HOST_AND_PORT.search(address or "")):
            socket.create_connection((place[1], int(place[2])), timeout=10).close()  # Ray itself retries for minutes
        ray.init(
            address="local" if local else address,
            num_cpus=num_workers if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level="warning",
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"the Ray cluster cannot be reached: {error}",
            where=f"RAY_ADDRESS={address}",
            hint="run ray start --head, or unset RAY_ADDRESS to run on this machine",
        ) from error


def _lost_worker(who: str) -> ResourceError:
    return ResourceError(
        f"{who} was killed",
        note="the usual reason is lack of memory; finished work is kept",
        hint='run again with fewer workers: --workers 1; your own scripts need: if __name__ == "__main__":',
    )
