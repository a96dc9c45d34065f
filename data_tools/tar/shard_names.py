"""Short names that tell shards apart: together with a key they identify a sample over all data sets of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_tools.tar.location import Location


class ShardNames:
    """The names of shards: of each the last part of its path, or as many of the last parts as tell it apart.

    `data/web/00000.tar` is `00000.tar` alone, and `web/00000.tar` next to `data/clean/00000.tar`. Folders that hold all
    shards are not part of a name, so that it stays the same when these are moved together.

    Args:
        places: the shards. Two URLs that differ in their query alone, which is not shown, are numbered.
    """

    def __init__(self, places: Sequence[Location]):
        parts = [str(place).split("/") for place in places]
        lengths = [1] * len(parts)
        names = [path[-1] for path in parts]
        while True:
            counts = Counter(names)
            longer = [i for i, name in enumerate(names) if counts[name] > 1 and lengths[i] < len(parts[i])]
            if not longer:
                break
            for i in longer:
                lengths[i] += 1
                names[i] = "/".join(parts[i][-lengths[i] :])
        seen = Counter[str]()
        for i, name in enumerate(names):
            seen[name] += 1
            names[i] = name if counts[name] == 1 else f"{name}#{seen[name]}"
        self.names = names
        self._known = frozenset(names)

    def __getitem__(self, shard: int) -> str:
        """Return the name of a shard by its number."""
        return self.names[shard]

    def of(self, path: str) -> str:
        """Return the name of a shard by its path, in this place or in an earlier one; the last part if it has none."""
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))  # the longest first
        return next((end for end in ends if end in self._known), parts[-1])
