"""What is wrong with a run, by what its ranks report: one is lost, left with an error, or makes no progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_tools.core.errors import ResourceError

LOST_S = 10.0  # without a sign of life: killed, frozen or cut off
BROKEN_S = 3.0  # the same once a connection broke, for which hardly another reason is left


@dataclass
class Status:
    """Where a process is, as it tells the others."""

    beat: int = 0  # grows with each sign of life
    step: int = 0
    phase: str = "start"
    key: str = ""  # of the first sample
    idle_s: float = 0.0  # since the phase began
    waiting: bool = False  # for other processes, as far as can be told
    place: str = ""  # in the code
    patient: str = ""  # long work that is no standstill
    broken: str = ""  # what became of a connection
    left: str | None = None  # the error that it left with, "" for none

    def where(self, rank: int, step: int) -> str:
        """Return rank, step, phase, key and place in words; `step` is the one that the run came to, as others know."""
        told = [f"rank {rank}, step {step}", f"last heard of in step {self.step}" if self.step != step else ""]
        told += [f"phase {self.patient or self.phase}", f"first key {self.key!r}" if self.key else "", self.place]
        return ", ".join(filter(None, told))


@dataclass
class Seen:
    """The latest that a process told, and when that came in, by the clock of the one who looks."""

    status: Status = field(default_factory=Status)
    changed: float = 0.0


def judge(seen: Mapping[int, Seen], now: float, timeout_s: float) -> ResourceError | None:
    """Return what is wrong with the processes, by the ranks that told: lost, gone with an error, or standing still."""
    broken = any(each.status.broken for each in seen.values())
    step = max(each.status.step for each in seen.values())  # all are in one step, and the dead told theirs a while ago
    for rank, (status, silent_s) in {rank: (each.status, now - each.changed) for rank, each in seen.items()}.items():
        if silent_s <= (BROKEN_S if broken else LOST_S):
            continue
        if status.left is None:
            return lost_rank(rank, status, step, silence(silent_s))
        if status.left:
            return lost_rank(rank, status, step, f"ended with {status.left}")
        if broken:
            return lost_rank(rank, status, step, "left the run before the others")
    statuses = {rank: each.status for rank, each in seen.items()}
    candidates = statuses
    if any(status.patient for status in statuses.values()):  # an excuse for all but those that wait for nobody
        candidates = {rank: status for rank, status in statuses.items() if not (status.patient or status.waiting)}
    idle_s = max((status.idle_s for status in candidates.values() if status.left is None), default=0.0)
    if idle_s <= timeout_s:
        return None
    rank = min(candidates, key=lambda rank: _innocence(statuses[rank]))
    fault = "left the run before the others" if statuses[rank].left is not None else "made no progress"
    return lost_rank(rank, statuses[rank], step, f"{fault}, and the run stood still for {idle_s:.0f} s")


def _innocence(status: Status) -> tuple[bool, int, bool]:
    """Order processes of a run that stands still: the others wait for one that left, is behind, or does not wait."""
    return status.left is None, status.step, status.waiting


def silence(silent_s: float) -> str:
    """Return what is wrong with a rank that has not reported for so long."""
    return f"gave no sign of life for {silent_s:.0f} s: killed, frozen or cut off"


def lost_rank(rank: int, status: Status, step: int, what: str) -> ResourceError:
    """Return the error that ends all ranks because of one."""
    return ResourceError(
        f"rank {rank} {what}",
        where=status.where(rank, step),
        note="the others cannot go on without it, and all processes end; the checkpoints are whole",
        hint="look at the output of that process and at its machine, then run the same command again to go on",
    )


def broken_connection(status: Status, rank: int) -> ResourceError:
    """Return the error of a rank whose connection broke though all ranks are alive."""
    what = f"lost its connection to another process, though all are alive: {status.broken}"
    return lost_rank(rank, status, status.step, what)
