"""What a run tells: a JSON line a logged step, trackers, and progress on the terminal."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from data_tools.core.errors import ResourceError
from data_tools.core.files import write_atomic
from mmvit.train.record.trackers import Trackers

logger = logging.getLogger(__name__)

# Numbers that tell of the machine: they differ between two runs that compute the same.
OF_THE_MACHINE = ("time_s", "samples_per_s", "data_wait", "memory_mib", "tflops", "mfu")


class RunLog:
    """Writes `log.jsonl` and shows progress; does nothing on any process but the main one.

    `start_step` is where a resumed run goes on: lines of steps that will be repeated are taken out, and trackers,
    which can take nothing back, are not told of those steps again. `time_s` in a line is the time of the whole run,
    without what was lost and what lay between its starts.
    """

    def __init__(self, path: Path, *, num_steps: int, start_step: int, active: bool, trackers: Trackers | None = None):
        self.active = active
        self.num_steps = num_steps
        self.start_step = start_step
        self.started = time.perf_counter()
        self.latest: dict[str, Any] = {}
        if not active:
            return
        lines = read_whole_lines(path)
        kept = [line for line in lines if line["step"] <= start_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.trackers = trackers
        self.tracked = lines[-1]["step"] if lines else 0
        self.before = kept[-1].get("time_s", 0.0) if kept else 0.0
        self.file = path.open("ab", buffering=0)
        self.progress = _progress() if sys.stderr.isatty() else None
        if self.progress:
            self.progress.start()
            self.task = self.progress.add_task("training", total=num_steps, completed=start_step, numbers="")

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Log the numbers of a step; they stay on the terminal until newer ones come.

        Raises:
            ResourceError: the line cannot be written.
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
        if self.progress:
            self.progress.update(self.task, completed=step, numbers=text)
        else:
            print(f"step {step}/{self.num_steps}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was and close the file."""
        if self.active:
            if self.progress:
                self.progress.stop()
            if self.trackers:
                self.trackers.close()
            self.file.close()

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:  # a nearly full disk takes a part
                data = data[self.file.write(data) :]
        except OSError as error:
            raise ResourceError(
                f"the log cannot be written: {error.strerror}",
                where=str(self.file.name),
                note="the run stopped; its checkpoints are whole",
                hint="make room, then run the same command again to go on",
            ) from error


# What of the numbers a person sees while it runs, and how.
SHOWN = {
    "loss": "loss {:.3g}",
    "samples_per_s": "{:.0f} samples/s",
    "zero_shot_acc1": "zero-shot top-1 {:.1%}",
    "val_acc1": "accuracy {:.1%}",
    "cut_captions": "{:.1%} of captions cut",
    "bad_samples": "{} bad samples",
    "skipped_steps": "{} steps skipped",
}

MEASURED = ("zero_shot_acc1", "val_acc1")  # now and then: a line has them at their own step alone


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a `log.jsonl`; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines as far as it can be read, with a warning: a power cut may leave zeros in it."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows, damaged = [], 0
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            damaged += line.endswith(b"\n")
    if damaged:
        logger.warning("%d lines of %s are damaged and left out", damaged, path)
    return rows


def _progress() -> Progress:
    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(stderr=True),
    )
