"""The samples that a run could not use: each told once, counted by cause, limited."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_tools.core.errors import DataError, ResourceError, SampleError
from data_tools.core.files import write_atomic
from mmvit.train.record.run_log import read_whole_lines

FILE = "bad_samples.jsonl"


class BadSamples:
    """Keeps `bad_samples.jsonl`: a line {step, shard, key, cause, what} for each sample, however often it is met.

    Every process holds the same counts; the main one writes. Lines of steps that a resumed run repeats are taken out.

    Args:
        folder: of the run.
        start_step: where the run goes on.
        limit: number of samples from which on the run ends.
        active: whether this is the main process.
    """

    def __init__(self, folder: Path, *, start_step: int, limit: int, active: bool):
        self.path = folder / FILE
        self.limit = limit
        self.active = active
        self.counts: Counter[str] = Counter()
        self._known: set[tuple[str, ...]] = set()
        self.failure: ResourceError | None = None  # of the file, on the main process; the run ends with it
        rows = read_whole_lines(self.path)
        kept = [row for row in rows if row["step"] <= start_step]
        for row in kept:
            self._count(row)
        if active and self.path.exists():
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, step: int, errors: Iterable[SampleError]) -> None:
        """Note what the batch of `step` could not use.

        Raises:
            DataError: the limit is reached.
        """
        rows = [
            {"step": step, "shard": error.shard, "key": error.key, "cause": error.cause, "what": error.what}
            for error in errors
        ]
        new = [row for row in rows if self._count(row)]
        if new and self.active:
            self._append("".join(json.dumps(row) + "\n" for row in new))
        if self.counts.total() > self.limit:
            raise DataError(
                f"{self.counts.total()} samples cannot be used ({self.summary()})",
                where=str(self.path),
                note=f"more than {self.limit} end the run; the steps done are saved",
                hint="look at those that the file names (in shards: mmvit-data check, mmvit-data repair), or raise "
                "data.max_bad_fraction",
            )

    def sync(self) -> None:
        """Bring the file to the disk: a checkpoint, which does the same, must not know more steps than the file."""
        if self.active and self.counts and self.failure is None:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def failures(self) -> list[ResourceError]:
        """Return why the file could not be written."""
        return [self.failure] if self.failure else []

    def summary(self) -> str:
        """Return the counts by cause in words, "" for none."""
        return ", ".join(f"{count} {cause}" for cause, count in self.counts.most_common())

    def numbers(self) -> dict[str, object]:
        """Return what belongs into the log: the counts, where there are any."""
        return {"bad_samples": self.counts.total(), "bad_causes": dict(self.counts)} if self.counts else {}

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:
            self.failure = ResourceError(
                f"bad samples cannot be noted: {error.strerror}",
                where=str(self.path),
                note="the run stopped; its checkpoints are whole",
                hint="make room, then run the same command again to go on",
            )

    def _count(self, row: dict[str, object]) -> bool:
        """Count a sample that was not known yet, wherever its shard lies now; one without a key goes by its text."""
        name = (str(row["shard"]).rpartition("/")[2], str(row["key"] or row["what"]))
        if name in self._known:
            return False
        self._known.add(name)
        self.counts[str(row["cause"])] += 1
        return True
