"""Diagnosis of a run from the reports of its ranks: one is lost, exited with an error, or makes no progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_tools.core.errors import ResourceError

LOST_S = 10.0  # without a report: killed, frozen or disconnected
BROKEN_S = 3.0  # the same after a connection broke


@dataclass
class Status:
    """Where a rank is, as reported to the other ranks."""

    beat: int = 0  # incremented with each report
    step: int = 0
    phase: str = "start"
    key: str = ""  # of the first sample
    idle_s: float = 0.0  # since the phase began
    waiting: bool = False  # for other ranks, as far as known
    place: str = ""  # in the code
    patient: str = ""  # the name of long work without a timeout
    broken: str = ""  # the error of a broken connection
    left: str | None = None  # the error that it exited with, "" for none

    def where(self, rank: int, step: int) -> str:
        """Return rank, step, phase, key and place as text; `step` is the newest one that any rank reported."""
        parts = [f"rank {rank}, step {step}", f"last reported step {self.step}" if self.step != step else ""]
        parts += [f"phase {self.patient or self.phase}", f"first key {self.key!r}" if self.key else "", self.place]
        return ", ".join(filter(None, parts))


@dataclass
class Seen:
    """The latest report of a rank, and when it arrived, by the clock of the receiver."""

    status: Status = field(default_factory=Status)
    changed: float = 0.0


def judge(seen: Mapping[int, Seen], now: float, timeout_s: float) -> ResourceError | None:
    """Return an error if a rank is lost, exited early or makes no progress, by the reports of the ranks."""
    broken = any(each.status.broken for each in seen.values())
    step = max(
        each.status.step for each in seen.values()
    )  # all ranks are in the same step; a lost rank reported an older one
    for rank, (status, silent_s) in {rank: (each.status, now - each.changed) for rank, each in seen.items()}.items():
        if silent_s <= (BROKEN_S if broken else LOST_S):
            continue
        if status.left is None:
            return lost_rank(rank, status, step, silence(silent_s))
        if status.left:
            return lost_rank(rank, status, step, f"ended with {status.left}")
        if broken:
            return lost_rank(rank, status, step, "exited before the other ranks")
    statuses = {rank: each.status for rank, each in seen.items()}
    candidates = statuses
    if any(status.patient for status in statuses.values()):  # excuses all ranks except those that do not wait
        candidates = {rank: status for rank, status in statuses.items() if not (status.patient or status.waiting)}
    idle_s = max((status.idle_s for status in candidates.values() if status.left is None), default=0.0)
    if idle_s <= timeout_s:
        return None
    rank = min(candidates, key=lambda rank: _innocence(statuses[rank]))
    fault = "exited before the other ranks" if statuses[rank].left is not None else "made no progress"
    return lost_rank(rank, statuses[rank], step, f"{fault}; the run was stalled for {idle_s:.0f} s")


def _innocence(status: Status) -> tuple[bool, int, bool]:
    """Return a sort key for ranks of a stalled run: the first one exited, is behind, or does not wait for others."""
    return status.left is None, status.step, status.waiting


def silence(silent_s: float) -> str:
    """Return the message about a rank that has not reported for `silent_s` seconds."""
    return f"did not respond for {silent_s:.0f} s: killed, frozen or disconnected"


def lost_rank(rank: int, status: Status, step: int, what: str) -> ResourceError:
    """Return the error that ends all ranks because of one."""
    return ResourceError(
        f"rank {rank} {what}",
        where=status.where(rank, step),
        note="the other ranks cannot continue without it, and all ranks end; the checkpoints are complete",
        hint="check the output of that rank and its machine, then run the same command again to resume",
    )


def broken_connection(status: Status, rank: int) -> ResourceError:
    """Return the error of a rank whose connection broke though all ranks are alive."""
    what = f"lost its connection to another rank, though all ranks are alive: {status.broken}"
    return lost_rank(rank, status, status.step, what)
