"""Merges, splits and shuffles shards, all of their samples or those that a list names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.select.find import find_samples
from data_tools.select.write import OutputOptions, SampleTable, WriteReport, write_samples
from data_tools.tar.index import open_indexes
from data_tools.tar.location import LocationLike

UNKNOWN = "unknown_keys.txt"


def reshard(
    tars: Sequence[LocationLike], output: OutputOptions, keys: Path | None = None
) -> tuple[WriteReport, list[str] | None]:
    """Write the samples of the shards as new shards; return also the keys of the list that name no sample.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        output: where and how; without `shuffle` the order stays that of the input.
        keys: list of the samples to take, see `data_tools.select.find`; None takes all.

    Raises:
        DataError: the list names no sample, or none of the samples can be read.
        UsageError: bad options, a folder of something else, or a list that cannot be read.
    """
    table = SampleTable(open_indexes(tars))
    if keys is None:
        return write_samples(table, np.arange(len(table)), output, verb="reshard"), None
    named = find_samples(table, keys, num_workers=output.num_workers, engine=output.engine)
    return write_samples(table, named.chosen, output, verb="reshard", lists={UNKNOWN: named.unknown}), named.unknown
