"""What a run tells: a JSON line a logged step, and progress on the terminal."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from data_tools.atomic import write_atomic


class RunLog:
    """Writes `log.jsonl` and shows progress; does nothing on any process but the main one.

    `start_step` is where a resumed run goes on: lines of steps that will be repeated are taken out.
    """

    def __init__(self, path: Path, *, num_steps: int, start_step: int, active: bool):
        self.active = active
        self.num_steps = num_steps
        self.start_step = start_step
        self.started = time.perf_counter()
        self.latest: dict[str, Any] = {}
        if not active:
            return
        kept = [line for line in read_log(path) if line["step"] <= start_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = path.open("a", buffering=1)
        self.progress = _progress() if sys.stderr.isatty() else None
        if self.progress:
            self.progress.start()
            self.task = self.progress.add_task("training", total=num_steps, completed=start_step, numbers="")

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Log the numbers of a step; they stay on the terminal until newer ones come."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.latest |= numbers
        spent = time.perf_counter() - self.started
        left = int(spent / max(step - self.start_step, 1) * (self.num_steps - step))
        shown = [form.format(self.latest[name]) for name, form in SHOWN.items() if name in self.latest]
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
            self.file.close()


class Throughput:
    """Samples a second since the last reading, without the time of pauses."""

    def __init__(self) -> None:
        self.samples = 0
        self.since = time.perf_counter()

    def count(self, samples: int) -> None:
        """Add samples that a step has used."""
        self.samples += samples

    def rate(self) -> float:
        """Return samples a second and begin anew."""
        now = time.perf_counter()
        rate = self.samples / (now - self.since)
        self.samples, self.since = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


class CutCaptions:
    """The share of captions that were too long for the text tower and lost their tail, since the last reading."""

    def __init__(self) -> None:
        self.cut = self.seen = 0

    def count(self, cut: int, seen: int) -> None:
        """Add the captions of a step."""
        self.cut += cut
        self.seen += seen

    def share(self) -> float:
        """Return the share and begin anew."""
        share = self.cut / max(self.seen, 1)
        self.cut = self.seen = 0
        return share


# What of the numbers a person sees while it runs, and how.
SHOWN = {
    "loss": "loss {:.3g}",
    "samples_per_s": "{:.0f} samples/s",
    "zero_shot_acc1": "zero-shot top-1 {:.1%}",
    "cut_captions": "{:.1%} of captions cut",
    "bad_samples": "{} bad samples",
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a `log.jsonl`; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _progress() -> Progress:
    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(stderr=True),
    )
