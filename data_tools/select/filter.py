"""Selects the samples that satisfy a condition on their metadata, and on scores from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

from data_tools.core.errors import DataError, UsageError, did_you_mean
from data_tools.core.mapped import open_mapped, read_parquet
from data_tools.core.names import as_text
from data_tools.sample.table import SCHEMA, shard_metadata
from data_tools.select.expression import Expression
from data_tools.select.write import OutputOptions, SampleTable, WriteReport, owned_output, write_samples
from data_tools.tar.index import open_indexes
from data_tools.tar.location import LocationLike

DROPPED = "dropped.txt"

_COLUMNS = [name for name in SCHEMA.names if name != "phash"]
_SHARDS_AT_ONCE = 500  # shards whose tables are in memory at a time


class FilterReport(NamedTuple):
    """Numbers of samples kept and dropped.

    `failed` is, for each condition joined by `and`, the number of samples that do not satisfy it, and `unknown` the
    number of these whose value is missing; `written` is None for a dry run.
    """

    kept: int
    dropped: int
    failed: dict[str, int]
    unknown: dict[str, int]
    written: WriteReport | None

    def describe(self) -> str:
        """Return the report as text."""
        lines = [f"{self.kept} samples kept, {self.dropped} dropped"]
        for condition, failed in self.failed.items():
            unknown = f"  ({self.unknown[condition]} have no value)" if self.unknown[condition] else ""
            lines.append(f"  {failed:>9} fail  {condition}{unknown}")
        return "\n".join(lines if self.written is None else [*lines, self.written.describe()])

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON document."""
        return self._asdict() | {"written": None if self.written is None else self.written._asdict()}


def filter_samples(
    tars: Sequence[LocationLike],
    where: str,
    *,
    scores: Path | None = None,
    output: OutputOptions | None = None,
    num_workers: int | None = None,
    engine: str = "local",
) -> FilterReport:
    """Write the samples that satisfy the condition `where` as new shards, and the keys of the others to `dropped.txt`.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        where: see `data_tools.select.expression`; columns are those of `data_tools.sample.table` and of the scores.
        scores: parquet file with a column `key` (`key` or `shard.tar/key`) and any others.
        output: where the new shards are written; None only counts.
        num_workers: processes for the metadata, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        UsageError: the condition or the score file is invalid; raised before any shard is read.
        DataError: no sample is kept, or no score matches a sample.
    """
    expression = Expression(where)
    given = None if scores is None else _read_scores(scores, expression)
    empty = SCHEMA.empty_table().select(_COLUMNS)
    expression.mask(empty if given is None else _joined(empty, given, empty["key"])[0])
    with owned_output(output):
        table = SampleTable(open_indexes(tars))
        mask, scored = [], 0
        failed: Counter[str] = Counter()
        unknown: Counter[str] = Counter()
        for first in range(0, len(tars), _SHARDS_AT_ONCE):
            some = slice(first, first + _SHARDS_AT_ONCE)
            metadata = shard_metadata(tars[some], num_workers=num_workers, engine=engine)
            if given is not None:
                sizes = [len(index) for index in table.indexes[some]]
                shards = pa.array(map(as_text, np.repeat(table.names.names[some], sizes).tolist()), pa.string())
                full_keys = pc.binary_join_element_wise(shards, metadata["key"], "/")
                metadata, num = _joined(metadata, given, full_keys)
                scored += num
            mask.append(expression.mask(metadata))
            for condition, num_failed, num_unknown in expression.count_failed(metadata):
                failed[condition] += num_failed
                unknown[condition] += num_unknown
        if given is not None and not scored:
            hint = f"keys look like {table.full_key(0)!r} or {table.key(0)!r}"
            raise DataError("no score matches a sample of the shards", where=str(scores), hint=hint)
        kept = np.concatenate(mask)
        return FilterReport(
            kept=int(np.count_nonzero(kept)),
            dropped=int(np.count_nonzero(~kept)),
            failed=dict(failed),
            unknown=dict(unknown),
            written=None if output is None else _write(table, kept, where, output),
        )


def _write(table: SampleTable, kept: NDArray[np.bool_], where: str, output: OutputOptions) -> WriteReport:
    if not kept.any():
        raise DataError("no sample satisfies the condition: nothing to write", where=where)
    dropped = (table.full_key(int(sample)) for sample in np.flatnonzero(~kept))
    return write_samples(table, np.flatnonzero(kept), output, verb="filter", lists={DROPPED: dropped})


def _read_scores(path: Path, expression: Expression) -> pa.Table:
    """Return the columns of the scores that the expression uses, and `key`."""
    try:
        names = parquet.read_schema(open_mapped(path)).names
        if "key" not in names:
            hint = did_you_mean("key", names) or f"the columns are: {' '.join(names)}"
            raise UsageError("the scores have no column 'key'", where=str(path), hint=hint)
        used = [name for name in names if name in expression.names and name != "key"]
        double = [name for name in used if name in _COLUMNS]
        if double or not used:
            what = f"samples already have the columns {double}" if double else "the expression uses no score column"
            raise UsageError(what, where=str(path), hint=f"the columns are: {' '.join(names)}; rename or use them")
        table = read_parquet(path, ["key", *used])
        keys = table["key"].cast(pa.large_string())
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"the scores cannot be read: {error}", where=str(path), hint="use a parquet file") from error
    if pc.count_distinct(keys).as_py() != len(keys):
        raise UsageError("the scores have duplicate or missing keys", where=str(path), hint="use each key once")
    return table.set_column(table.column_names.index("key"), "key", keys)


def _joined(metadata: pa.Table, scores: pa.Table, full_keys: pa.ChunkedArray) -> tuple[pa.Table, int]:
    """Return the metadata joined with the columns of the scores, and the number of rows with scores."""
    known = scores["key"].combine_chunks()
    places = [pc.index_in(keys.cast(pa.large_string()), value_set=known) for keys in (full_keys, metadata["key"])]
    place = pc.coalesce(*places)
    for name in scores.column_names:
        if name != "key":
            metadata = metadata.append_column(name, scores[name].take(place))
    return metadata, len(place) - place.null_count
