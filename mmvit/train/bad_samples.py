"""The samples that a run could not use: each told once, counted by cause, limited."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_tools.atomic import write_atomic
from data_tools.errors import DataError, SampleError

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
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a crash may have cut the last one
        kept = [row for row in rows if row["step"] <= start_step]
        for row in kept:
            self._count(row)
        if active and lines:
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
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new))
        if self.counts.total() > self.limit:
            raise DataError(
                f"{self.counts.total()} samples cannot be used ({self.summary()})",
                where=str(self.path),
                meaning=f"more than {self.limit} end the run; the steps done are saved",
                mend="look at the shards with mmvit-data check, mend them with mmvit-data repair, or raise "
                "data.max_bad_fraction",
            )

    def sync(self) -> None:
        """Bring the file to the disk: a checkpoint, which does the same, must not know more steps than the file."""
        if self.active and self.counts:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def summary(self) -> str:
        """Return the counts by cause in words, "" for none."""
        return ", ".join(f"{count} {cause}" for cause, count in self.counts.most_common())

    def numbers(self) -> dict[str, object]:
        """Return what belongs into the log: the counts, where there are any."""
        return {"bad_samples": self.counts.total(), "bad_causes": dict(self.counts)} if self.counts else {}

    def _count(self, row: dict[str, object]) -> bool:
        """Count a sample that was not known yet, wherever its shard lies now; one without a key goes by its text."""
        name = (str(row["shard"]).rpartition("/")[2], str(row["key"] or row["what"]))
        if name in self._known:
            return False
        self._known.add(name)
        self.counts[str(row["cause"])] += 1
        return True
