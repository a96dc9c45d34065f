"""Prepares the batches of coming steps ahead, in workers that are watched."""

import contextlib
import ctypes
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_tools.core.errors import MmvitError, ResourceError, UsageError
from data_tools.core.program import STOP_SIGNALS
from mmvit.data.batches import Batch, TrainBatches

_SHARED_MEMORY = Path("/dev/shm")
_MAX_PREFETCH = 4  # batches that a worker prepares ahead
_GRACE_S = 1.0  # for a worker to end by itself
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_CHECK_S = 0.5  # between two looks at the workers while a batch is waited for
_STOP_S = 3.0  # wait for a batch that a stop request still allows, so that the current step is finished
_HINT = "check the disk or the network it reads from, then run again"


class Interrupted(ResourceError):  # noqa: N818 - it reports a state, not an error
    """The run was asked to stop while it waited for a batch that does not come."""

    exit_code = 143


Loaded = Batch | MmvitError
_NAME_LIMIT_S = 5.0


class Prefetch(NamedTuple):
    """How far ahead is read: `factor` batches by each worker, `size` bytes in all."""

    num_workers: int
    factor: int
    size: int

    def __str__(self) -> str:
        if not self.num_workers:
            return "batches are loaded between the steps"
        return f"workers: {self.num_workers}, preparing {self.size / 2**20:.0f} MiB of batches ahead"


def plan_prefetch(batches: TrainBatches) -> Prefetch:
    """Return how far to read ahead within `data.prefetch_mb`, by fewer workers where it holds no batch for each.

    Raises:
        UsageError: shared memory has no room for it.
    """
    config = batches.config
    if not config.num_workers:
        return Prefetch(0, 0, 0)
    item = batches.num_bytes
    room = config.prefetch_mb * 2**20 // item  # batches
    num_workers = max(1, min(config.num_workers, room))
    factor = max(1, min(_MAX_PREFETCH, room // num_workers))
    prefetch = Prefetch(num_workers, factor, num_workers * factor * item)
    needed = (prefetch.size + item) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # with the batch in use
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else needed
    if needed > free:
        raise UsageError(
            f"shared memory has {free / 2**20:.0f} MiB free, the loader needs {needed / 2**20:.0f} MiB",
            where=str(_SHARED_MEMORY),
            note="its workers would be killed; nothing was started",
            hint="a larger docker run --shm-size, a smaller data.prefetch_mb, or data.num_workers=0",
        )
    return prefetch


class LoadedBatches(Dataset[Loaded]):
    """Batches by number as a loader sees them; records what each of its workers is reading.

    An error is handed over as a value: the loader would rebuild a raised one from its traceback's text.
    """

    def __init__(self, batches: TrainBatches):
        self.batches = batches
        # For each worker its process id, the sample it reads (+ 1; 0 for none) and since when. Shared memory, so that
        # it can be seen when the worker hangs or is gone.
        self.reading = multiprocessing.get_context("spawn").RawArray("d", 3 * max(1, batches.config.num_workers))

    def __getitem__(self, number: int) -> Loaded:
        worker = get_worker_info()
        slot = 3 * worker.id if worker else 0

        def note(sample_id: int) -> None:
            self.reading[slot : slot + 3] = [os.getpid(), sample_id + 1, time.monotonic()]

        try:
            return self.batches.load(number, note)
        except MmvitError as error:
            return error
        except OSError as error:
            return _broken(f"a shard cannot be read: {error}", self.last_read([os.getpid()]), _HINT)
        finally:
            self.reading[slot + 1] = 0

    def last_read(self, pids: Collection[int] = ()) -> str:
        """Name the sample that is being read for the longest time, by the processes `pids` or by any; "" for none.

        Its key is in the index, on the disk that may be stalled: after a while only the shard is named.
        """
        slots = [self.reading[i : i + 3] for i in range(0, len(self.reading), 3)]
        begun = [(since, int(sample) - 1) for pid, sample, since in slots if sample and (not pids or pid in pids)]
        if not begun:
            return ""
        since, sample_id = min(begun)
        source = self.batches.source
        names: queue.SimpleQueue[str] = queue.SimpleQueue()
        ask = threading.Thread(target=lambda: names.put(str(source.error("damaged", "", sample_id).where)), daemon=True)
        ask.start()
        try:
            name = names.get(timeout=_NAME_LIMIT_S)
        except queue.Empty:
            name = source.shard(sample_id)
        return f"{name}, for {time.monotonic() - since:.0f} s"


class Loader:
    """Yields the batches of `numbers` in order, once; an error takes the place of a batch that cannot be loaded.

    A stalled reader and a killed worker are errors too, ResourceErrors that name the sample that was being read, and so
    is `Interrupted`, if `stop_requested` becomes true while no batch arrives. Used in a `with` block, at whose end all
    workers have ended.
    """

    def __init__(
        self, batches: TrainBatches, numbers: Sequence[int], stop_requested: Callable[[], bool] = lambda: False
    ):
        self.loaded = LoadedBatches(batches)
        self.numbers = numbers
        self.stop_requested = stop_requested
        self.limit = batches.config.stall_timeout_s
        self._waited_s = 0.0
        self._first_key = ""
        self.prefetch = plan_prefetch(batches)
        self._stream = self._from_workers() if self.prefetch.num_workers else self._between_steps()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Loaded]:
        return self._stream

    def waited_s(self) -> float:
        """Return the time spent waiting for batches since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def reading(self) -> str:
        """Name the sample that is being read for the longest time, or else the first one of the last batch."""
        return self.loaded.last_read() or self._first_key

    def _between_steps(self) -> Generator[Loaded, None, None]:
        for number in self.numbers:
            yield self._watched(partial(self.loaded.__getitem__, number), [])

    def _from_workers(self) -> Generator[Loaded, None, None]:
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        batches = iter(
            DataLoader(
                self.loaded,
                batch_size=None,  # an item is a whole batch already
                sampler=self.numbers,
                num_workers=self.prefetch.num_workers,
                prefetch_factor=self.prefetch.factor,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_begin_worker,
                # Python 3.14 would fork them from a server, which dies of the signals that stop a run.
                multiprocessing_context="fork" if sys.platform == "linux" else None,
            )
        )
        if threading.current_thread() is threading.main_thread():  # others set no handler, and neither does torch there
            signal.signal(signal.SIGCHLD, handler)  # torch's own would raise in the middle of a step when a worker dies
        workers = [child for child in multiprocessing.active_children() if child not in others]
        try:
            for _ in self.numbers:
                yield self._watched(partial(next, batches), workers)
        finally:
            # Without its last reference the loader asks the workers to end, and would wait 5 s for each, twice.
            impatience = threading.Timer(_GRACE_S, _kill, [workers])
            impatience.start()
            del batches
            impatience.cancel()
            _kill(workers)  # where an error or a thread that hangs still holds the loader
            for worker in workers:
                worker.join(_GRACE_S)

    def _watched(self, load: Callable[[], Loaded], workers: Sequence[BaseProcess]) -> Loaded:
        """Return what `load` returns. It runs in a thread, which can be left behind when it hangs."""
        start = time.monotonic()
        try:
            loaded = self._awaited(load, workers, start)
        finally:
            self._waited_s += time.monotonic() - start
        if isinstance(loaded, Batch):
            self._first_key = loaded.keys[0]
        return loaded

    def _awaited(self, load: Callable[[], Loaded], workers: Sequence[BaseProcess], start: float) -> Loaded:
        box: queue.SimpleQueue[Loaded | BaseException] = queue.SimpleQueue()
        threading.Thread(target=_put_result, args=(box, load), daemon=True).start()
        while True:
            result: Loaded | BaseException | None = None
            with contextlib.suppress(queue.Empty):
                result = box.get(timeout=min(_CHECK_S, self.limit))
            if isinstance(result, Batch | MmvitError):
                return result
            patience = _GRACE_S if isinstance(result, OSError | EOFError) else 0  # connections break before the end
            ended = connection.wait([worker.sentinel for worker in workers], patience)
            if ended:
                return self._killed([worker for worker in workers if worker.sentinel in ended])
            if result is not None:
                raise result
            waited_s = time.monotonic() - start
            if waited_s >= _STOP_S and self.stop_requested():
                return Interrupted("stop requested while waiting for a batch", where=self.reading())
            if waited_s >= self.limit:
                what = f"no batch came for {self.limit:.0f} s: a data loader worker is stalled"
                return _broken(what, self.loaded.last_read(), f"{_HINT}; data.stall_timeout_s is the limit")

    def _killed(self, dead: Sequence[BaseProcess]) -> ResourceError:
        for worker in dead:
            worker.join(_GRACE_S)
        codes = [worker.exitcode or 0 for worker in dead]
        ends = [f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})" for code in codes]
        return _broken(
            f"a worker {' and another '.join(ends)}",
            self.loaded.last_read([worker.pid or 0 for worker in dead]),
            "if memory ran out: fewer data.num_workers or a smaller data.prefetch_mb; then run again",
        )


def _put_result(box: "queue.SimpleQueue[Loaded | BaseException]", load: Callable[[], Loaded]) -> None:
    try:
        box.put(load())
    except BaseException as error:  # raised again by the main thread
        box.put(error)


def _broken(what: str, where: str, hint: str) -> ResourceError:
    where = where or "no sample was being read"
    return ResourceError(what, where=where, note="the run stopped; its checkpoints are complete", hint=hint)


def _begin_worker(worker_id: int) -> None:
    """Ignore signals to the process group, which the main process handles, and end with the main process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a worker may outlive a main process that is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
