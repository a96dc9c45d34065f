"""Merges, splits and shuffles shards, with all of their samples or those of a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.select.find import find_samples
from data_tools.select.write import OutputOptions, SampleTable, WriteReport, owned_output, write_samples
from data_tools.tar.index import open_indexes
from data_tools.tar.location import LocationLike

UNKNOWN = "unknown_keys.txt"


def reshard(
    tars: Sequence[LocationLike], output: OutputOptions, keys: Path | None = None
) -> tuple[WriteReport, list[str] | None]:
    """Write the samples of the shards as new shards; return also the keys of the list that match no sample.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        output: output options; without `shuffle` the order is that of the input.
        keys: list of the samples to select, see `data_tools.select.find`; None selects all.

    Raises:
        DataError: the list matches no sample, or none of the samples can be read.
        UsageError: options are invalid, the folder contains something else, or the list cannot be read.
    """
    with owned_output(output):
        table = SampleTable(open_indexes(tars))
        if keys is None:
            return write_samples(table, np.arange(len(table)), output, verb="reshard"), None
        named = find_samples(table, keys, num_workers=output.num_workers, engine=output.engine)
        return write_samples(table, named.chosen, output, verb="reshard", lists={UNKNOWN: named.unknown}), named.unknown
