"""Finds samples by their keys as users write them: `key`, `shard.tar/key` or `PATH/shard.tar/key`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data_tools.tar.index import ShardIndex
from data_tools.tar.shard_names import ShardNames


class FoundSamples(NamedTuple):
    """Shard number and number within the shard of each sample, ascending; and the names that match no sample."""

    places: list[tuple[int, int]]
    unknown: list[str]


def find_keys(indexes: Sequence[ShardIndex], names: Iterable[str]) -> FoundSamples:
    """Return the samples that `names` match; a key that occurs in several shards selects all of them."""
    is_found = dict.fromkeys(names, False)
    places = []
    shard_names = ShardNames([index.tar for index in indexes])
    for shard, index in enumerate(indexes):
        prefixes = {"", f"{index.tar.name}/", f"{shard_names[shard]}/", f"{index.tar}/"}
        for i, key in enumerate(index.keys()):
            of_sample = [name for prefix in prefixes if (name := prefix + key) in is_found]
            if of_sample:
                places.append((shard, i))
                is_found |= dict.fromkeys(of_sample, True)
    return FoundSamples(places, [name for name, found in is_found.items() if not found])
