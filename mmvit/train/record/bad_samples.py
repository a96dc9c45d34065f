"""The invalid samples of a run: each is logged once; they are counted by cause, and their number is limited."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_tools.core.errors import DataError, ResourceError, SampleError
from data_tools.core.files import write_atomic
from data_tools.tar.shard_names import ShardNames
from mmvit.train.record.log_lines import read_whole_lines

FILE = "bad_samples.jsonl"


class BadSamples:
    """Writes `bad_samples.jsonl`: one line {step, shard, key, cause, what} for each invalid sample.

    All ranks hold the same counts; only the main rank writes. Lines of steps that a resumed run repeats are removed.

    Args:
        folder: of the run.
        names: of the shards of all data sets.
        start_step: step from which the run resumes.
        limit: most invalid samples before the run ends.
        active: whether this is the main rank.
    """

    def __init__(self, folder: Path, names: ShardNames, *, start_step: int, limit: int, active: bool):
        self.path = folder / FILE
        self.names = names
        self.limit = limit
        self.active = active
        self.counts: Counter[str] = Counter()
        self._known: set[tuple[str, ...]] = set()
        self.failure: ResourceError | None = None  # of writing the file, on the main rank; it ends the run
        rows = read_whole_lines(self.path)
        kept = [row for row in rows if row["step"] <= start_step]
        for row in kept:
            self._count(row)
        if active and self.path.exists():
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, step: int, errors: Iterable[SampleError]) -> None:
        """Record the invalid samples of the batch of `step`.

        Raises:
            DataError: the limit is exceeded.
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
                f"{self.counts.total()} invalid samples ({self.summary()})",
                where=str(self.path),
                note=f"at most {self.limit} are allowed; the completed steps are saved",
                hint="inspect the samples listed in the file (for shards: mmvit-data check, mmvit-data repair), or "
                "increase data.max_bad_fraction",
            )

    def sync(self) -> None:
        """Flush the file to disk, before a checkpoint is saved that contains the same steps."""
        if self.active and self.counts and self.failure is None:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def failures(self) -> list[ResourceError]:
        """Return the error of writing the file, if any."""
        return [self.failure] if self.failure else []

    def summary(self) -> str:
        """Return the counts by cause as text, "" if there are none."""
        return ", ".join(f"{count} {cause}" for cause, count in self.counts.most_common())

    def numbers(self) -> dict[str, object]:
        """Return the values to log: the counts, if there are any."""
        return {"bad_samples": self.counts.total(), "bad_causes": dict(self.counts)} if self.counts else {}

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:
            self.failure = ResourceError(
                f"invalid samples cannot be recorded: {error.strerror}",
                where=str(self.path),
                note="the run stopped; its checkpoints are complete",
                hint="free disk space, then run the same command again to resume",
            )

    def _count(self, row: dict[str, object]) -> bool:
        """Count a sample if it is new, by its shard and key; one without a key is identified by its message."""
        name = (self.names.of(str(row["shard"])), str(row["key"] or row["what"]))
        if name in self._known:
            return False
        self._known.add(name)
        self.counts[str(row["cause"])] += 1
        return True
