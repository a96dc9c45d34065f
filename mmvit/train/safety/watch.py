"""Monitoring of the ranks of a run: if one is lost or stalled, all end with an error that names it."""

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

TICK_S = 1.0  # between two reports
START_S = 60.0  # until the first report
# Errors of gloo and NCCL when the other end of a connection is lost.
BROKEN = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)
# Files of the main thread's frame while it waits for other ranks; in a backward pass this is unknown.
WAITING = re.compile(r"torch/(distributed|autograd|nn/parallel)/|accelerate/utils/operations")
MAX_TEXT = 300  # characters of a foreign error

_numbers = itertools.count()


class Watch:
    """Ends all ranks of a run, with exit code 5, if one is lost or stalled; does nothing for a single rank.

    A thread of each rank reports about every second where its main thread is, through the store of the process group.
    The main rank monitors all others and they monitor the main one, so that the cost grows linearly with the number of
    ranks. That thread prints the verdict and ends the process without cleanup, because the main thread may hang in a
    collective operation. Files on disk are written such that they survive this.

    Args:
        timeout_s: maximum time between two calls of `at`, unless a rank is `patient`.
    """

    def __init__(self, timeout_s: float):
        self.rank, self.world_size = world()
        self.timeout_s = timeout_s
        self.mine = Status()
        self._since = self._answered = time.monotonic()
        self._main_thread = threading.get_ident()
        self._over = threading.Event()
        self._reporting = threading.Lock()
        self._ending = threading.Lock()

    def __enter__(self) -> "Watch":
        if self.world_size > 1:
            start = time.monotonic() + START_S
            others = range(1, self.world_size) if self.rank == 0 else (0,)
            self._seen = {rank: Seen(changed=start) for rank in others}
            self._store = _connect()
            self._report()
            self._answered = time.monotonic()
            for target in (self._exchange, self._guard):
                threading.Thread(target=target, name=f"watch{target.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.world_size > 1:
            self._report_end(error)
            self._over.set()

    def at(self, step: int, phase: str, key: str = "") -> None:
        """Record that this rank begins a phase of a step, whose first sample is `key`."""
        self._since = time.monotonic()
        self.mine.step, self.mine.phase, self.mine.key = step, phase, key

    @contextlib.contextmanager
    def patient(self, what: str) -> Iterator[None]:
        """Suspend the timeout for the block, here and on ranks that wait for it; lost ranks are still detected."""
        before, self.mine.patient = self.mine.patient, what
        try:
            yield
        finally:
            self._since, self.mine.patient = time.monotonic(), before

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Report an error of the block to the other ranks; if a lost rank caused it, end with its error."""
        try:
            yield
        except BaseException as error:
            if self.world_size == 1:
                raise
            if not _is_echo(error):
                self._report_end(error)
                time.sleep(2 * TICK_S)  # the store may end with this process: let the other ranks read it first
                raise
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(
                    signal.SIGTERM, signal.SIG_IGN
                )  # from the launcher, which noticed too: report the cause first
            self.mine.broken = " ".join(str(error).split())[:MAX_TEXT]
            time.sleep(2 * LOST_S)  # a thread ends the process earlier, unless all ranks report
            self._end(broken_connection(self.mine, self.rank))

    def _report_end(self, error: BaseException | None) -> None:
        with self._reporting, contextlib.suppress(RuntimeError):  # the store may be gone
            if self.mine.left is None:
                self.mine.left = "" if error is None else f"{type(error).__name__}: {error}".split("\n")[0][:MAX_TEXT]
                self._report(_raised_in(error))

    def _report(self, frame: FrameType | None = None) -> None:
        mine = self.mine
        mine.beat += 1
        mine.idle_s = time.monotonic() - self._since
        mine.waiting, mine.place = _position(frame or sys._current_frames().get(self._main_thread))
        self._store.set(str(self.rank), json.dumps(asdict(mine)))

    def _exchange(self) -> None:
        """Exchange reports with the other ranks and judge them, repeatedly."""
        while not self._over.wait(TICK_S) and self.mine.left is None:
            try:
                with self._reporting:
                    if self.mine.left is None:
                        self._report()
                verdict = self._receive()
                self._answered = time.monotonic()
                if verdict is None:
                    now = time.monotonic()
                    error = judge(self._seen | {self.rank: Seen(self.mine, now)}, now, self.timeout_s)
                    if error is None:
                        continue
                    verdict = str(error)
                    self._store.set("verdict", verdict)
            except RuntimeError as error:  # the store is lost, and `_guard` ends the process
                self.mine.broken = str(error)[:MAX_TEXT]
                return
            self._end(verdict)

    def _receive(self) -> str | None:
        """Receive the reports of the other ranks; return the verdict if another rank has reached one."""
        known = [rank for rank in self._seen if self._store.check([str(rank)])]
        for rank, report in zip(known, self._store.multi_get([str(rank) for rank in known]), strict=True):
            status = Status(**json.loads(report))
            if status.beat != self._seen[rank].status.beat:
                self._seen[rank] = Seen(status, time.monotonic())
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def _guard(self) -> None:
        """End the process if the store no longer answers: `_exchange` may wait for it forever."""
        before = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            if now - before > BROKEN_S:  # this process itself was stalled
                self._answered = now
            before = now
            if now - self._answered > (BROKEN_S if self.mine.broken else LOST_S):
                self._end(self._unreachable(now - self._answered))

    def _unreachable(self, silent_s: float) -> ResourceError:
        """Return the error if the store does not answer: rank 0 or the launcher holds it."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.rank:
            return lost_rank(0, self._seen[0].status, self.mine.step, silence(silent_s))
        host = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        what = f"cannot reach its launcher at {host}: killed, frozen or disconnected"
        return lost_rank(self.rank, self.mine, self.mine.step, what)

    def _end(self, verdict: str | ResourceError) -> None:
        """Print the verdict and end the process."""
        with self._ending:  # once
            restore = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
            os.write(2, f"{restore}mmvit: {verdict}\n".encode("utf-8", "backslashreplace"))
            time.sleep(2 * TICK_S)  # the store may end with this process: let the other ranks read it first
            os._exit(ResourceError.exit_code)


@contextlib.contextmanager
def joining(timeout_s: float) -> Iterator[None]:
    """End this process, with exit code 5, if the block waits longer than `timeout_s` for the other ranks."""
    error = ResourceError(
        f"the ranks did not connect within {timeout_s:.0f} s",
        where=f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}",
        note="nothing was started",
        hint="check the output of the other ranks; train.timeout_s is the limit",
    )

    def give_up() -> None:
        os.write(2, f"mmvit: {error}\n".encode("utf-8", "backslashreplace"))
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


def _position(frame: FrameType | None) -> tuple[bool, str]:
    """Return whether a thread waits for other ranks, and its position in this package."""
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
    """Connect to the store of the process group, with keys that only this watch uses."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=LOST_S),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"mmvit/watch/{attempt}/{next(_numbers)}", store)  # type: ignore[attr-defined]
