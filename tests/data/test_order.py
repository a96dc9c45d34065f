"""The order uses every sample once an epoch, follows from (seed, step) alone, and stays the same for ever."""

import hashlib
import pickle

import numpy as np
import pytest

from data_tools.errors import UsageError
from mmvit.data.order import SampleOrder

LAYOUTS = [
    (1, None, 10),
    (2, [1, 1], 1),
    (97, None, 10),
    (97, [10] * 9 + [7], 3),
    (101, [101], 1),
    (100, [0, 50, 0, 0, 50, 0], 1),
    (1000, [1] * 1000, 7),
    (997, [100] * 9 + [97], 100),
]


@pytest.mark.parametrize(("num_samples", "sizes", "block_shards"), LAYOUTS)
def test_every_sample_once_an_epoch(num_samples: int, sizes: list[int] | None, block_shards: int):
    order = SampleOrder(num_samples, 3, sizes, block_shards)
    for epoch in range(4):
        permutation = order.epoch(epoch)
        assert permutation.dtype == np.int64
        assert np.array_equal(np.sort(permutation), np.arange(num_samples))


@pytest.mark.parametrize("batch_size", [1, 7, 32, 97, 250])
def test_batches_are_the_stream_without_loss_or_double(batch_size: int):
    order = SampleOrder(97, 5, [10] * 9 + [7], 3)
    steps = -(-97 * 6 // batch_size)
    batches = [order.ids(step * batch_size, (step + 1) * batch_size) for step in range(steps)]
    assert {len(batch.ids) for batch in batches} == {batch_size}
    epochs = np.concatenate([batch.epochs for batch in batches])[: 97 * 6]
    ids = np.concatenate([batch.ids for batch in batches])[: 97 * 6]
    assert np.array_equal(epochs, np.repeat(np.arange(6), 97))
    for epoch in range(6):
        assert np.array_equal(ids[epochs == epoch], order.epoch(epoch))


def test_any_piece_is_the_same_piece():
    order = SampleOrder(97, 5, [10] * 9 + [7], 3)
    whole = order.ids(0, 500)
    for start, stop in [(0, 0), (3, 4), (96, 98), (200, 500), (499, 500)]:
        piece = SampleOrder(97, 5, [10] * 9 + [7], 3).ids(start, stop)
        assert np.array_equal(piece.ids, whole.ids[start:stop])
        assert np.array_equal(piece.epochs, whole.epochs[start:stop])


def test_golden_order():
    """A change here breaks the resuming of every run that users have: it needs a new format version."""
    assert SampleOrder(12, 0, [4, 4, 4], 2).epoch(0).tolist() == [7, 6, 4, 5, 11, 9, 8, 10, 1, 0, 2, 3]
    order = SampleOrder(10_007, 2**32 - 1, [1000] * 10 + [7])
    digest = hashlib.sha256(order.ids(9_000, 31_000).ids.astype("<i8").tobytes()).hexdigest()
    assert digest == "567607e66e8837fedad948ffe2778143556ee47ba9b6fdf3de01c76ba2c62573"


def test_seed_and_epoch_change_the_order():
    orders = [SampleOrder(500, seed).epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != list(range(500))


def test_samples_are_mixed_within_blocks_of_shards():
    sizes = [10] * 20
    permutation = SampleOrder(200, 1, sizes, block_shards=4).epoch(0)
    blocks = [set((permutation[start : start + 40] // 10).tolist()) for start in range(0, 200, 40)]
    assert [len(block) for block in blocks] == [4] * 5
    assert set.union(*blocks) == set(range(20))
    assert blocks[0] != {0, 1, 2, 3}


def test_a_large_order_is_computed_by_blocks():
    order = SampleOrder(400_000_000, 0, [10_000] * 40_000)
    assert len(np.unique(order.ids(7000 * 4096, 7001 * 4096).ids)) == 4096


def test_pickles():
    order = SampleOrder(97, 5, [10] * 9 + [7])
    order.epoch(0)
    assert np.array_equal(pickle.loads(pickle.dumps(order)).epoch(3), order.epoch(3))


def test_cached_blocks_are_not_changed_by_their_users():
    order = SampleOrder(10, 0)
    first = order.epoch(0)
    kept = first.copy()
    first[:] = 0
    order.ids(2, 5).ids[:] = 0
    assert np.array_equal(order.epoch(0), kept)


@pytest.mark.parametrize(
    "arguments",
    [(0, 0), (5, -1), (5, 2**32), (5, 0, [2, 2]), (5, 0, [6, -1]), (5, 0, None, 0), (0, 0, [])],
)
def test_bad_arguments(arguments: tuple):
    with pytest.raises(UsageError):
        SampleOrder(*arguments)


def test_bad_calls():
    order = SampleOrder(10, 0)
    with pytest.raises(UsageError, match="no piece"):
        order.ids(-1, 4)
