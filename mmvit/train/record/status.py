"""The state of a run, read from its folder without torch and without disturbing it."""

import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.core.errors import UsageError
from data_tools.core.near import near_path
from data_tools.core.ownership import Owner, owner_of
from mmvit.config import CONFIG, read_tree
from mmvit.train.record.log_lines import CHANGED, LOG, read_whole_lines

_RECENT = 20  # lines of the log that the rate is measured over
_MISSING = ("step", "time_s")


class RunStatus(NamedTuple):
    """What is known of a run.

    Attributes:
        run: its folder.
        state: finished, running, stopped, diverged, or unknown if another machine owns the folder.
        step: of the last line of the log.
        steps: of the whole run.
        steps_per_s: in the last lines of the log.
        samples_per_s: likewise.
        left_s: seconds of training that are left at this rate.
        loss: of the last line.
        logged_s_ago: age of the last line, seconds.
        checkpoint: step of the newest checkpoint.
        checkpoint_s_ago: its age, seconds.
        owner: the process that writes the folder, and whether it is alive.
        bad_samples: by cause.
        skipped_steps: steps whose update was skipped.
        model: the model folder, if it is written.
    """

    run: str
    state: str
    step: int
    steps: int
    steps_per_s: float | None
    samples_per_s: float | None
    left_s: float | None
    loss: float | None
    logged_s_ago: float | None
    checkpoint: int | None
    checkpoint_s_ago: float | None
    owner: dict[str, Any] | None
    bad_samples: dict[str, int]
    skipped_steps: int
    model: str | None


def run_status(run: Path) -> RunStatus:
    """Return the state of a run.

    Raises:
        UsageError: there is no run in the folder.
    """
    if not (run / CONFIG).is_file():
        what = "the folder is not that of a run" if run.exists() else "there is no such run"
        inside = sorted(path.parent for path in run.glob(f"*/{CONFIG}"))
        hint = f"did you mean {inside[-1]}?" if inside else "" if run.exists() else near_path(run)
        raise UsageError(what, where=str(run), hint=hint or "pass the folder that out=FOLDER of a run names")
    tree = read_tree(run / CONFIG)
    steps, batch_size = int(tree["train"]["steps"]), int(tree["train"]["batch_size"])
    lines = [line for line in read_whole_lines(run / LOG) if CHANGED not in line and "step" in line]
    last = lines[-1] if lines else {}
    step, rate = int(last.get("step", 0)), _rate(lines[-_RECENT:])
    folders = {int(path.name[5:]): path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal()}
    newest = max(folders, default=None)
    model = run / "model" if (run / "model" / "mmvit.json").is_file() else None
    owner = owner_of(run)
    return RunStatus(
        run=str(run),
        state=_state(run, owner, step >= steps and model is not None),
        step=step,
        steps=steps,
        steps_per_s=rate,
        samples_per_s=rate and rate * batch_size,
        left_s=(steps - step) / rate if rate else None,
        loss=last.get("loss"),
        logged_s_ago=_age(run / LOG),
        checkpoint=newest,
        checkpoint_s_ago=None if newest is None else _age(folders[newest]),
        owner=owner and owner._asdict(),
        bad_samples=dict(Counter(str(row.get("cause")) for row in read_whole_lines(run / "bad_samples.jsonl"))),
        skipped_steps=int(last.get("skipped_steps", 0)),
        model=None if model is None else str(model),
    )


def describe_status(status: RunStatus) -> dict[str, str]:
    """Return the state of a run as rows for people."""
    share = f"{status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})"
    rows = {"run": status.run, "state": status.state, "step": share}
    if status.steps_per_s is not None and status.samples_per_s is not None:
        rows["rate"] = f"{status.steps_per_s:.3g} steps/s, {status.samples_per_s:.4g} samples/s"
    if status.left_s is not None and status.state != "finished":
        rows["time left"] = _span(status.left_s) + ("" if status.state == "running" else ", once it is resumed")
    if status.loss is not None:
        rows["loss"] = f"{status.loss:.4g}"
    if status.logged_s_ago is not None:
        rows["last log line"] = f"{_span(status.logged_s_ago)} ago"
    rows["last checkpoint"] = "none yet"
    if status.checkpoint is not None and status.checkpoint_s_ago is not None:
        rows["last checkpoint"] = f"step {status.checkpoint:,}, {_span(status.checkpoint_s_ago)} ago"
    if status.owner:
        alive = {True: "alive", False: "no longer alive", None: "on another machine, not known whether it is alive"}
        owner = status.owner
        rows["owner"] = f"process {owner['pid']} on {owner['host']}, {alive[owner['alive']]}, since {owner['started']}"
    causes = ", ".join(f"{count} x {cause}" for cause, count in status.bad_samples.items())
    rows["corrupt samples"] = causes or "none"
    if status.skipped_steps:
        rows["skipped steps"] = str(status.skipped_steps)
    if status.model:
        rows["model"] = status.model
    elif status.state == "stopped":
        rows["resume"] = "run the same command again"
    return rows


def _state(run: Path, owner: Owner | None, finished: bool) -> str:
    if owner and owner.alive:
        return "running"
    if finished:
        return "finished"
    if owner and owner.alive is None:
        return "unknown"
    return "diverged" if (run / "diverged.json").exists() else "stopped"


def _rate(lines: list[dict[str, Any]]) -> float | None:
    """Return the steps per second between the first and the last line."""
    if len(lines) < 2 or any(key not in line for line in (lines[0], lines[-1]) for key in _MISSING):
        return None
    seconds = float(lines[-1]["time_s"]) - float(lines[0]["time_s"])
    return (lines[-1]["step"] - lines[0]["step"]) / seconds if seconds > 0 else None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _span(seconds: float) -> str:
    """Return a time span as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
