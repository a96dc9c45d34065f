"""Watching over the processes of a run: where one is lost or stands still, all end and say which."""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from data_tools.core.errors import ResourceError
from mmvit.losses.gather import world
from mmvit.train.safety.verdict import BROKEN_S, LOST_S, Seen, Status, broken_connection, judge, lost_rank, silence

TICK_S = 1.0  # between two signs of life
START_S = 60.0  # until the first sign of life
# What gloo and NCCL say when the other end of a connection goes away.
BROKEN = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)
# Where the main thread stands while it waits for other processes; in a backward pass nobody can tell.
WAITING = re.compile(r"torch/(distributed|autograd|nn/parallel)/|accelerate/utils/operations")
MAX_TEXT = 300  # characters of a foreign error

_numbers = itertools.count()


class Watch:
    """Ends all processes of a run, with exit code 5, when one is lost or stands still; does nothing for a lone one.

    A thread of each process tells the others about every second where its main thread is, through the store by which
    the processes found each other. The main process watches all and the others watch the main one, so that the cost
    grows with the number of processes and not with its square. The verdict is told and the process ended from that
    thread, without clean-up: the main thread may hang in a collective operation for ever. What is on disk was written
    to be safe from that.

    Args:
        timeout_s: longest time from one call of `at` to the next, unless a process is `patient`.
    """

    def __init__(self, timeout_s: float):
        self.rank, self.world_size = world()
        self.timeout_s = timeout_s
        self.mine = Status()
        self._since = self._answered = time.monotonic()
        self._main_thread = threading.get_ident()
        self._over = threading.Event()
        self._telling = threading.Lock()
        self._ending = threading.Lock()

    def __enter__(self) -> "Watch":
        if self.world_size > 1:
            start = time.monotonic() + START_S
            others = range(1, self.world_size) if self.rank == 0 else (0,)
            self._seen = {rank: Seen(changed=start) for rank in others}
            self._store = _connect()
            self._tell()
            self._answered = time.monotonic()
            for target in (self._talk, self._guard):
                threading.Thread(target=target, name=f"watch{target.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.world_size > 1:
            self._leave(error)
            self._over.set()

    def at(self, step: int, phase: str, key: str = "") -> None:
        """Tell that the process begins a phase of a step, whose first sample is `key`."""
        self._since = time.monotonic()
        self.mine.step, self.mine.phase, self.mine.key = step, phase, key

    @contextlib.contextmanager
    def patient(self, what: str) -> Iterator[None]:
        """Let a block take as long as it takes, on this process and on all that wait for it; a death is noticed."""
        before, self.mine.patient = self.mine.patient, what
        try:
            yield
        finally:
            self._since, self.mine.patient = time.monotonic(), before

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Tell the others of an error of the block; where it is but the echo of theirs, end with what befell them."""
        try:
            yield
        except BaseException as error:
            if self.world_size == 1:
                raise
            if not _is_echo(error):
                self._leave(error)
                time.sleep(2 * TICK_S)  # the store may end with this process: let the others read it first
                raise
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which has noticed too: first tell why
            self.mine.broken = " ".join(str(error).split())[:MAX_TEXT]
            time.sleep(2 * LOST_S)  # a thread ends the process before, unless all show signs of life
            self._end(broken_connection(self.mine, self.rank))

    def _leave(self, error: BaseException | None) -> None:
        with self._telling, contextlib.suppress(RuntimeError):  # the store may be gone
            if self.mine.left is None:
                self.mine.left = "" if error is None else f"{type(error).__name__}: {error}".split("\n")[0][:MAX_TEXT]
                self._tell(_raised_in(error))

    def _tell(self, frame: FrameType | None = None) -> None:
        mine = self.mine
        mine.beat += 1
        mine.idle_s = time.monotonic() - self._since
        mine.waiting, mine.place = _standing(frame or sys._current_frames().get(self._main_thread))
        self._store.set(str(self.rank), json.dumps(asdict(mine)))

    def _talk(self) -> None:
        """Tell and hear, again and again, and judge."""
        while not self._over.wait(TICK_S) and self.mine.left is None:
            try:
                with self._telling:
                    if self.mine.left is None:
                        self._tell()
                verdict = self._hear()
                self._answered = time.monotonic()
                if verdict is None:
                    now = time.monotonic()
                    error = judge(self._seen | {self.rank: Seen(self.mine, now)}, now, self.timeout_s)
                    if error is None:
                        continue
                    verdict = str(error)
                    self._store.set("verdict", verdict)
            except RuntimeError as error:  # the store is gone, and the guard draws the conclusion
                self.mine.broken = str(error)[:MAX_TEXT]
                return
            self._end(verdict)

    def _hear(self) -> str | None:
        """Take in what the others told; returns the verdict where another process has come to one."""
        known = [rank for rank in self._seen if self._store.check([str(rank)])]
        for rank, told in zip(known, self._store.multi_get([str(rank) for rank in known]), strict=True):
            status = Status(**json.loads(told))
            if status.beat != self._seen[rank].status.beat:
                self._seen[rank] = Seen(status, time.monotonic())
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def _guard(self) -> None:
        """End where the store no longer answers: `_talk` may wait for it for ever."""
        before = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            if now - before > BROKEN_S:  # this process was the one that stood still
                self._answered = now
            before = now
            if now - self._answered > (BROKEN_S if self.mine.broken else LOST_S):
                self._end(self._unreachable(now - self._answered))

    def _unreachable(self, silent_s: float) -> ResourceError:
        """Return what is wrong where the store does not answer: rank 0 holds it, or the launcher."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.rank:
            return lost_rank(0, self._seen[0].status, self.mine.step, silence(silent_s))
        host = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        what = f"cannot reach its launcher at {host}: killed, frozen or cut off"
        return lost_rank(self.rank, self.mine, self.mine.step, what)

    def _end(self, verdict: str | ResourceError) -> None:
        """Tell the verdict and end the process."""
        with self._ending:  # once
            restore = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a bar of progress hides the cursor
            os.write(2, f"{restore}mmvit: {verdict}\n".encode())
            time.sleep(2 * TICK_S)  # the store may end with this process: let the others read it first
            os._exit(ResourceError.exit_code)


@contextlib.contextmanager
def joining(timeout_s: float) -> Iterator[None]:
    """End this process, with exit code 5, where the block waits so long for the other processes to come."""
    error = ResourceError(
        f"the processes of the run did not come together within {timeout_s:.0f} s",
        where=f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}",
        note="nothing was started",
        hint="look at the output of the other processes; train.timeout_s is the limit",
    )

    def give_up() -> None:
        os.write(2, f"mmvit: {error}\n".encode())
        os._exit(error.exit_code)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_echo(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(BROKEN.search(str(error))))


def _standing(frame: FrameType | None) -> tuple[bool, str]:
    """Tell whether a thread waits for other processes, and where in this package it is."""
    waiting = frame is not None and (
        bool(WAITING.search(frame.f_code.co_filename)) or frame.f_code.co_name == "gather_errors"
    )
    package = Path(__file__).parents[2]
    while frame is not None and package not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    if frame is None:
        return waiting, ""
    return waiting, f"{Path(frame.f_code.co_filename).relative_to(package.parent)}:{frame.f_lineno}"


def _raised_in(error: BaseException | None) -> FrameType | None:
    return deque(traceback.walk_tb(error.__traceback__), maxlen=1)[0][0] if error else None


def _connect() -> dist.Store:
    """Connect to the store by which the processes of this run found each other, at keys of this watch alone."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=LOST_S),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"mmvit/watch/{attempt}/{next(_numbers)}", store)  # type: ignore[attr-defined]
