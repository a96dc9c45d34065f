"""The order of the samples as a formula: what a run reads at step s follows from (seed, s) alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.core.errors import UsageError

Int64s = NDArray[np.int64]


class StreamSlice(NamedTuple):
    """A piece of the endless stream: sample `ids[j]` as it is used in epoch `epochs[j]`, both int64 [n]."""

    epochs: Int64s
    ids: Int64s


class SampleOrder:
    """An endless stream of sample ids: epoch 0, epoch 1, ... each a permutation of 0 .. num_samples - 1.

    Position p of the stream is element p mod N of the permutation of epoch p div N. Batch `step` is the positions
    step * B up to (step + 1) * B, so a batch may reach over the end of an epoch: nothing is dropped or doubled, every
    sample of an epoch is used exactly once, and the state of a run is its step number alone.

    The permutation of an epoch is part of the format (a resumed run must find the same order in a later version):

        draw(n, k) = n raw 64-bit outputs of PCG64(SeedSequence((seed, epoch, k)))
        shards, in the order of stable argsort(draw(num_shards, 0)), are cut into blocks of `block_shards`
        the samples of block b, one shard after the other, are put in the order of stable argsort(draw(n_b, b + 1))

    Raw outputs and SeedSequence are what numpy promises never to change (NEP 19); its `permutation` is not. Samples are
    mixed within a block only, so that a reader touches few shards at a time.

    Args:
        num_samples: N, at least 1.
        seed: 0 .. 2**32 - 1.
        shard_sizes: number of samples of each shard; None takes all samples as one shard.
        block_shards: how many shards are mixed with each other.

    Raises:
        UsageError: an argument out of its range, or sizes that do not sum to `num_samples`.
    """

    def __init__(self, num_samples: int, seed: int, shard_sizes: Sequence[int] | None = None, block_shards: int = 10):
        sizes = np.asarray([num_samples] if shard_sizes is None else shard_sizes, np.int64)
        if num_samples < 1 or sizes.min(initial=0) < 0 or int(sizes.sum()) != num_samples:
            raise UsageError(f"{num_samples} samples in shards of {sizes.tolist()[:10]} cannot be put in an order")
        _check_seed(seed)
        if block_shards < 1:
            raise UsageError(f"block_shards must be at least 1, got {block_shards}")
        self.num_samples = num_samples
        self.seed = seed
        self.block_shards = block_shards
        self._sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        self._make_caches()

    def _make_caches(self) -> None:
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_plan", "_block")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def epoch(self, epoch: int) -> Int64s:
        """Return the permutation of one epoch, int64 [N]."""
        return self.ids(epoch * self.num_samples, (epoch + 1) * self.num_samples).ids

    def ids(self, start: int, stop: int) -> StreamSlice:
        """Return positions `start` up to `stop` of the endless stream; only the blocks that they touch are computed."""
        _check_positions(start, stop)
        epochs = np.arange(start, stop, dtype=np.int64) // self.num_samples
        pieces = [np.empty(0, np.int64)]
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.num_samples)
            block_starts = self._plan(epoch)[1]
            block = int(np.searchsorted(block_starts, offset, side="right")) - 1
            first = offset - int(block_starts[block])
            piece = self._block(epoch, block)[first : first + stop - position]
            pieces.append(piece)
            position += len(piece)
        return StreamSlice(epochs, np.concatenate(pieces))  # a copy: the blocks are cached

    def _make_plan(self, epoch: int) -> tuple[Int64s, Int64s]:
        """Return the shuffled shards and the position in the epoch at which each block of them begins."""
        shards = np.argsort(self._draw(len(self._sizes), epoch, 0), kind="stable")
        block_sizes = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self.block_shards))
        return shards, np.cumsum(block_sizes) - block_sizes

    def _make_block(self, epoch: int, block: int) -> Int64s:
        shards = self._plan(epoch)[0][block * self.block_shards : (block + 1) * self.block_shards]
        samples = np.concatenate([np.arange(self._starts[s], self._starts[s] + self._sizes[s]) for s in shards])
        permuted: Int64s = samples[np.argsort(self._draw(len(samples), epoch, block + 1), kind="stable")]
        return permuted

    def _draw(self, n: int, epoch: int, stream: int) -> NDArray[np.uint64]:
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch, stream)))
        return np.asarray(bits.random_raw(n), np.uint64)


class MixedOrder:
    """An endless stream over several data sets, each used in proportion to its weight and evenly spread.

    Data set d with N_d samples of weight w_d has C_d = max(1, round(w_d * N_d)) positions of every mixed epoch, which
    is sum(C_d) positions long (`round` takes the even neighbour of a half). Use j of data set d, j = 0, 1, ..., has
    the time (2j + 1) / (2 C_d); the stream is all uses in the order of (time, d). So a mixed epoch is one unit of
    time, and with D data sets a stretch of L positions holds L * s_d uses of data set d with share s_d, up to
    1 + (D - 2) * s_d more or fewer.

    Use j is position j of the data set's own `SampleOrder`, which has the seed (seed + 2654435769 d) mod 2**32, another
    for each d: every sample of d is used once before any is used again. Sample i of data set d has the id
    i + N_0 + ... + N_(d-1), and `epochs` are the data set's own, so that a repeated sample is augmented differently.
    All this is part of the format, as the order of one data set is.

    Args:
        shard_sizes: for each data set, the number of samples of each of its shards; two data sets at least.
        weights: for each data set, how often a sample is used in a mixed epoch, on average.
        seed: 0 .. 2**32 - 1.
        block_shards: as for `SampleOrder`.

    Raises:
        UsageError: an argument out of its range, or a data set without samples.
    """

    def __init__(
        self, shard_sizes: Sequence[Sequence[int]], weights: Sequence[float], seed: int, block_shards: int = 10
    ):
        if len(shard_sizes) < 2 or len(weights) != len(shard_sizes):
            raise UsageError(f"{len(shard_sizes)} data sets with {len(weights)} weights cannot be mixed")
        _check_seed(seed)
        sizes = [sum(each) for each in shard_sizes]
        for weight, size in zip(weights, sizes, strict=True):
            if not 0 < weight * size < 2**53:
                raise UsageError(f"a data set of {size} samples cannot have the weight {weight}")
        self.counts = [max(1, round(weight * size)) for weight, size in zip(weights, sizes, strict=True)]
        self.num_samples = sum(self.counts)
        self.weights = list(weights)
        self._orders = [
            SampleOrder(size, (seed + 2654435769 * d) % 2**32, each, block_shards)
            for d, (size, each) in enumerate(zip(sizes, shard_sizes, strict=True))
        ]
        self._first_ids = [sum(sizes[:d]) for d in range(len(sizes))]

    def ids(self, start: int, stop: int) -> StreamSlice:
        """Return positions `start` up to `stop` of the endless stream; the work does not depend on where they are."""
        _check_positions(start, stop)
        # Up to the time n / num_samples there are n uses, give or take half a use for each data set.
        margin = len(self.counts)
        first, last = self._uses_until(max(0, start - margin)), self._uses_until(stop + margin)
        # Times that differ do so by 1 / (2 C_d C_e) at least: these whole numbers are in the order of the exact times.
        scale = max(self.counts) ** 2
        uses = sorted(
            ((2 * j + 1) * scale // count, d) for d, count in enumerate(self.counts) for j in range(first[d], last[d])
        )
        owners = np.array([d for _, d in uses], np.int64)
        before, mine = np.split(owners, [start - sum(first)])
        mine = mine[: stop - start]
        epochs, ids = np.empty_like(mine), np.empty_like(mine)
        for d, order in enumerate(self._orders):
            at = mine == d
            use = first[d] + int((before == d).sum())
            epochs[at], ids[at] = order.ids(use, use + int(at.sum()))
            ids[at] += self._first_ids[d]
        return StreamSlice(epochs, ids)

    def check_batch(self, batch_size: int) -> None:
        """Raise UsageError if a batch has more uses of a data set than that has samples, and so a sample twice."""
        for d, (count, order) in enumerate(zip(self.counts, self._orders, strict=True)):
            uses = batch_size * count / self.num_samples
            if uses <= order.num_samples:
                continue
            size = order.num_samples
            most = size * (self.num_samples - count) // (batch_size - size)  # uses of the data set that fit
            digits = 10 ** (3 - len(str(most // size)))  # three of them, rounded down
            fits = f"a weight of at most {most * digits // size / digits:g}, " if most else ""
            raise UsageError(
                f"data.weights[{d}] is {self.weights[d]:g}: a batch of {batch_size} would hold each of the "
                f"{size} samples of that data set {uses / size:.1f} times",
                where="data.weights",
                note="nothing was started: a sample would come several times in a batch",
                hint=f"{fits}a smaller train.batch_size, or more data",
            )

    def _uses_until(self, n: int) -> list[int]:
        """Return for each data set the number of its uses up to the time n / num_samples."""
        return [(2 * n * count + self.num_samples) // (2 * self.num_samples) for count in self.counts]


class RepeatedOrder:
    """An endless stream in whose batches each sample occurs `repeats` times, each time with another augmentation.

    Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019): a batch of B holds about B / repeats samples.
    Element q of the repeated stream is copy q mod repeats of position q div repeats of `order`; a batch is B elements
    in a row, put in the order of (copy, q), so that neighbours, which may be mixed, are different samples. `epochs`
    counts the uses of a sample, epoch * repeats + copy, so that each copy is augmented differently. With one
    repeat it is `order` itself.

    DeiT's sampler draws the same batches, but starts a new permutation after N elements, having used N / repeats of
    the samples; here all samples are used before any comes again.

    Args:
        order: what is repeated.
        repeats: uses of a sample; 3 in DeiT.
        batch_size: B, of the global batch; `repeats` need not divide it.

    Raises:
        UsageError: fewer than one repeat, or a batch that does not hold all copies of two samples.
    """

    def __init__(self, order: SampleOrder | MixedOrder, repeats: int, batch_size: int):
        if not 1 <= repeats <= max(1, batch_size // 2):
            what = f"a batch of {batch_size} cannot contain two samples {repeats} times each"
            raise UsageError(what, hint="decrease data.repeats or increase train.batch_size")
        self.num_samples = order.num_samples * repeats
        self._order = order
        self._repeats = repeats
        self._batch_size = batch_size

    def ids(self, start: int, stop: int) -> StreamSlice:
        """Return positions `start` up to `stop` of the endless stream."""
        _check_positions(start, stop)
        size = self._batch_size
        first = start // size
        elements = np.arange(first * size, max(first + 1, -(-stop // size)) * size, dtype=np.int64).reshape(-1, size)
        by_copy = np.argsort(elements % self._repeats, axis=1, kind="stable")
        mine = np.take_along_axis(elements, by_copy, axis=1).flatten()[start - first * size : stop - first * size]
        lowest, highest = (int(elements.flat[end]) // self._repeats for end in (0, -1))
        epochs, ids = self._order.ids(lowest, highest + 1)
        at, copies = np.divmod(mine, self._repeats)
        return StreamSlice(epochs[at - lowest] * self._repeats + copies, ids[at - lowest])


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError(f"the seed must be 0 .. {2**32 - 1}, got {seed}", hint="choose a smaller seed")


def _check_positions(start: int, stop: int) -> None:
    if not 0 <= start <= stop:
        raise UsageError(f"positions {start} .. {stop} are not a valid slice of the stream")
