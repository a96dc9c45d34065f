"""The log of a run: one JSON line per logged step, trackers, and progress on the terminal."""

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from data_tools.core.errors import ResourceError
from data_tools.core.files import write_atomic
from data_tools.core.program import leave_closed_terminal
from mmvit.train.record.log_lines import CHANGED as CHANGED
from mmvit.train.record.log_lines import read_log as read_log
from mmvit.train.record.log_lines import read_whole_lines
from mmvit.train.record.trackers import Trackers

logger = logging.getLogger(__name__)

# Values that depend on the machine: they differ between runs with identical results.
OF_THE_MACHINE = ("time_s", "samples_per_s", "data_wait", "memory_mib", "tflops", "mfu")


class RunLog:
    """Writes `log.jsonl` and shows progress; does nothing on ranks other than the main one.

    `start_step` is the step from which a run resumes: lines of later steps are removed, because those steps are
    repeated, and repeated steps are not sent to trackers again, which cannot delete them. `time_s` of a line is the
    training time since the first step, without interruptions and without steps that were lost.
    """

    def __init__(self, path: Path, *, num_steps: int, start_step: int, active: bool, trackers: Trackers | None = None):
        self.active = active
        self.num_steps = num_steps
        self.start_step = start_step
        self.started = time.perf_counter()
        self.latest: dict[str, Any] = {}
        self.last: dict[str, Any] = {}  # the line of the step from which the run resumes, or the one before
        if not active:
            return
        lines = read_whole_lines(path)
        kept = _until(lines, start_step)
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.last = next((line for line in reversed(kept) if CHANGED not in line), {})
        self.trackers = trackers
        self.tracked = lines[-1]["step"] if lines else 0
        self.before = self.last.get("time_s", 0.0)
        self.file = path.open("ab", buffering=0)
        self.progress = _progress() if sys.stderr.isatty() else None
        if self.progress:
            self.progress.start()
            self.task = self.progress.add_task("training", total=num_steps, completed=start_step, numbers="")

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Log the values of a step and show the latest value of each on the terminal.

        Raises:
            ResourceError: the log cannot be written.
        """
        if not self.active:
            return
        spent = time.perf_counter() - self.started
        self._append({"step": step, "time_s": round(self.before + spent, 3), **numbers})
        if self.trackers and step > self.tracked:
            self.trackers.log(step, numbers)
        self.latest |= numbers
        left = int(spent / max(step - self.start_step, 1) * (self.num_steps - step))
        now = self.latest if self.progress else {k: n for k, n in self.latest.items() if k not in MEASURED} | numbers
        shown = [form.format(now[name]) for name, form in SHOWN.items() if now.get(name) is not None]
        text = "  ".join([*shown, f"{left // 60}:{left % 60:02d} left"])
        self._show(step, text)

    def close(self) -> None:
        """Restore the terminal and close the file."""
        if self.active:
            if self.progress:
                leave_closed_terminal()
                self.progress.stop()
            if self.trackers:
                self.trackers.close()
            self.file.close()

    def _show(self, step: int, text: str) -> None:
        try:
            if self.progress:
                self.progress.update(self.task, completed=step, numbers=text)
            else:
                print(f"step {step}/{self.num_steps}  {text}", file=sys.stderr, flush=True)
        except OSError:  # the terminal was closed, which stops the run or, under nohup, does not
            leave_closed_terminal()

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:  # a nearly full disk accepts a part
                data = data[self.file.write(data) :]
        except OSError as error:
            raise ResourceError(
                f"the log cannot be written: {error.strerror}",
                where=str(self.file.name),
                note="the run stopped; its checkpoints are complete",
                hint="free disk space, then run the same command again to resume",
            ) from error


# The values shown on the terminal, with their formats.
SHOWN = {
    "loss": "loss {:.3g}",
    "samples_per_s": "{:.0f} samples/s",
    "zero_shot_acc1": "zero-shot top-1 {:.1%}",
    "val_acc1": "accuracy {:.1%}",
    "val_loss": "held-out loss {:.3g}",
    "val_text_to_image_r1": "R@1 {:.1%}",
    "cut_captions": "{:.1%} of captions cut",
    "bad_samples": "{} invalid samples",
    "skipped_steps": "{} steps skipped",
}

MEASURED = (
    "zero_shot_acc1",
    "val_acc1",
    "val_loss",
    "val_text_to_image_r1",
)  # shown only at the steps that measured them


def log_changes(path: Path, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Add a line with the settings that changed when the run resumed at `step`: old and new value by key."""
    lines = _until(read_whole_lines(path), step)
    line = {"step": step, "time_s": lines[-1].get("time_s", 0.0) if lines else 0.0, CHANGED: dict(changes)}
    line = json.loads(json.dumps(line))  # tuples as lists
    if not lines or lines[-1] != line:  # else the run was killed before it wrote its config
        write_atomic(path, "".join(json.dumps(each) + "\n" for each in [*lines, line]).encode())


def _until(lines: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return the lines up to a step; changed settings of later lines hold from this step on."""
    kept = [line for line in lines if line["step"] <= step]
    time_s = {name: kept[-1][name] for name in ("time_s",) if kept and name in kept[-1]}
    return kept + [line | {"step": step} | time_s for line in lines if line["step"] > step and CHANGED in line]


def _progress() -> Progress:
    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(stderr=True),
    )
