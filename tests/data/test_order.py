"""The order uses every sample once an epoch, follows from (seed, step) alone, and stays the same for ever."""

import hashlib
import pickle
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_tools.core.errors import UsageError
from mmvit.data.order import MixedOrder, RepeatedOrder, SampleOrder

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


def test_weight_that_brings_a_sample_several_times_in_a_batch_is_refused():
    """The largest weight that is named fits, and the next one of its digits does not."""
    order = MixedOrder([[8], [200]], [25.0, 1.0], 0)
    with pytest.raises(UsageError, match=r"weights\[0\] is 25: a batch of 64 .* 8 samples .* 4\.0 times") as error:
        order.check_batch(64)
    assert (error.value.where, error.value.hint) == (
        *("data.weights", "a weight of at most 3.5, a smaller train.batch_size, or more data"),
    )
    MixedOrder([[8], [200]], [3.5, 1.0], 0).check_batch(64)
    with pytest.raises(UsageError):
        MixedOrder([[8], [200]], [3.6, 1.0], 0).check_batch(64)
    MixedOrder([[32], [16, 16]], [1.0, 1.0], 0).check_batch(64)


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
    with pytest.raises(UsageError, match="not a valid slice"):
        order.ids(-1, 4)


@st.composite
def mixes(draw: st.DrawFn) -> tuple:
    """Draw the arguments only: checking a constructor's types uses `random`, which hypothesis wants to own."""
    shards = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any)
    sizes = draw(st.lists(shards, min_size=2, max_size=5))
    weights = [draw(st.sampled_from([0.001, 0.1, 0.5, 1.0, 1.37, 3.0])) for _ in sizes]
    return sizes, weights, draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 3))


def owners(order: MixedOrder, ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(order._first_ids, ids, side="right") - 1


@hypothesis.given(mixes(), st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_piece_of_a_mix_is_the_same_piece(mix: tuple, data: st.DataObject):
    order = MixedOrder(*mix)
    whole = order.ids(0, 3 * order.num_samples)
    start = data.draw(st.integers(0, 3 * order.num_samples))
    stop = data.draw(st.integers(start, 3 * order.num_samples))
    piece = order.ids(start, stop)
    assert piece.ids.dtype == piece.epochs.dtype == np.int64
    assert np.array_equal(piece.ids, whole.ids[start:stop])
    assert np.array_equal(piece.epochs, whole.epochs[start:stop])


@hypothesis.given(mixes())
@hypothesis.settings(deadline=None, max_examples=60)
def test_a_mix_is_ordered_by_the_exact_times(mix: tuple):
    order = MixedOrder(*mix)
    times = [(Fraction(2 * use + 1, 2 * count), d) for d, count in enumerate(order.counts) for use in range(2 * count)]
    found = owners(order, order.ids(0, 2 * order.num_samples).ids)
    assert found.tolist() == [d for _, d in sorted(times)]


@hypothesis.given(mixes(), st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_a_mix_is_spread_evenly(mix: tuple, data: st.DataObject):
    order = MixedOrder(*mix)
    mine = owners(order, order.ids(0, 3 * order.num_samples).ids)
    for epoch in np.split(mine, 3):
        assert np.bincount(epoch, minlength=len(order.counts)).tolist() == order.counts
    length = data.draw(st.integers(1, order.num_samples))
    for d, count in enumerate(order.counts):
        share = Fraction(count, order.num_samples)
        sums = np.concatenate([[0], np.cumsum(mine == d)])
        windows = sums[length:] - sums[:-length]
        bound = 1 + (len(order.counts) - 2) * share
        assert max(abs(int(n) - length * share) for n in (windows.min(), windows.max())) <= bound


@hypothesis.given(mixes())
@hypothesis.settings(deadline=None, max_examples=60)
def test_each_sample_of_a_mix_is_used_once_before_any_is_used_again(mix: tuple):
    order = MixedOrder(*mix)
    epochs, ids = order.ids(0, 4 * order.num_samples)
    mine = owners(order, ids)
    for d, own in enumerate(order._orders):
        uses = ids[mine == d] - order._first_ids[d]
        assert epochs[mine == d].tolist() == [use // own.num_samples for use in range(len(uses))]
        for start in range(0, len(uses) - own.num_samples + 1, own.num_samples):
            assert sorted(uses[start : start + own.num_samples].tolist()) == list(range(own.num_samples))


def test_golden_mix():
    """A change here breaks the resuming of every run that users have: it needs a new format version."""
    order = MixedOrder([[4, 4], [3]], [1.0, 2.0], 0)
    assert order.ids(0, 14).ids.tolist() == [3, 8, 2, 9, 0, 10, 1, 7, 9, 5, 10, 4, 8, 6]
    assert order.ids(0, 14).epochs.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0]
    order = MixedOrder([[1000] * 10 + [7], [500] * 3, [3]], [0.5, 2.0, 0.1], 2**32 - 1)
    assert order.counts == [5004, 3000, 1]
    digest = hashlib.sha256(np.stack(order.ids(7_000, 29_000)).astype("<i8").tobytes()).hexdigest()
    assert digest == "b69b6ade960a17f3e0f392985feeda0b8150e43bf325d5333c072d9fe1e9b827"


def test_data_sets_of_a_mix_have_orders_of_their_own():
    epochs, ids = MixedOrder([[100], [100]], [1.0, 1.0], 7).ids(0, 200)
    assert ids[::2].tolist() == SampleOrder(100, 7).epoch(0).tolist()
    assert ids[1::2].tolist() == (SampleOrder(100, (7 + 2654435769) % 2**32).epoch(0) + 100).tolist()
    assert not epochs.any()


def test_a_large_mix_is_computed_by_pieces():
    order = MixedOrder([[10_000] * 40_000, [10_000] * 1000, [1000] * 7], [1.0, 0.37, 12.5], 0)
    assert order.num_samples == 400_000_000 + 3_700_000 + 87_500
    start = 10**12
    epochs, ids = order.ids(start, start + 4096)
    assert epochs.max() == start * 87_500 // order.num_samples // 7000
    assert np.bincount(owners(order, ids)).tolist() == [4058, 37, 1]


def test_a_mix_pickles():
    order = MixedOrder([[5, 5], [9]], [1.0, 2.0], 3)
    order.ids(0, 10)
    assert np.array_equal(pickle.loads(pickle.dumps(order)).ids(7, 90).ids, order.ids(7, 90).ids)


@pytest.mark.parametrize(
    "arguments",
    [
        ([[5]], [1.0], 0),
        ([], [], 0),
        ([[5], [5]], [1.0], 0),
        ([[5], [5]], [1.0, 0.0], 0),
        ([[5], [5]], [1.0, -1.0], 0),
        ([[5], [5]], [1.0, float("nan")], 0),
        ([[5], [5]], [1.0, float("inf")], 0),
        ([[5], [0]], [1.0, 1.0], 0),
        ([[5], [5]], [1.0, 1.0], -1),
        ([[5], [5]], [1.0, 1.0], 2**32),
    ],
)
def test_bad_mixes(arguments: tuple):
    with pytest.raises(UsageError):
        MixedOrder(*arguments)


def test_bad_calls_of_a_mix():
    with pytest.raises(UsageError, match="not a valid slice"):
        MixedOrder([[5], [5]], [1.0, 1.0], 0).ids(4, 3)


REPEATED = [(SampleOrder(97, 5, [10] * 9 + [7], 3), 3, 12), (SampleOrder(97, 5), 3, 32), (SampleOrder(50, 1), 2, 7)]
REPEATED += [(MixedOrder([[5, 5], [9]], [1.0, 2.0], 3), 4, 8), (SampleOrder(10, 0), 3, 30)]


@pytest.mark.parametrize(("order", "repeats", "batch_size"), REPEATED)
def test_d4_repeated_batches_are_those_of_the_repeated_stream(order: SampleOrder, repeats: int, batch_size: int):
    """Batch s is elements s B .. (s + 1) B of the stream in which each sample comes `repeats` times in a row."""
    found = RepeatedOrder(order, repeats, batch_size)
    length = 3 * order.num_samples * repeats // batch_size * batch_size
    epochs, ids = found.ids(0, length)
    plain = order.ids(0, -(-length // repeats))
    assert epochs.dtype == ids.dtype == np.int64
    expected = [
        (e * repeats + copy, i) for e, i in zip(*map(np.ndarray.tolist, plain), strict=True) for copy in range(repeats)
    ][:length]
    uses = list(zip(epochs.tolist(), ids.tolist(), strict=True))
    assert len(set(uses)) == length  # no use has the random changes of another
    for start in range(0, length, batch_size):
        assert sorted(uses[start : start + batch_size]) == sorted(expected[start : start + batch_size])


@pytest.mark.parametrize(("order", "repeats", "batch_size"), REPEATED)
def test_any_piece_of_a_repeated_order_is_the_same_piece(order: SampleOrder, repeats: int, batch_size: int):
    found = RepeatedOrder(order, repeats, batch_size)
    whole = found.ids(0, 20 * batch_size)
    rng = np.random.default_rng(0)
    for start, stop in [
        (0, 0),
        (3, 3),
        (batch_size, batch_size),
        *np.sort(rng.integers(20 * batch_size, size=(50, 2))),
    ]:
        piece = found.ids(int(start), int(stop))
        assert np.array_equal(piece.ids, whole.ids[start:stop])
        assert np.array_equal(piece.epochs, whole.epochs[start:stop])


def test_neighbours_in_a_repeated_batch_are_different_samples():
    """Which mixup needs: an image mixed with itself is none. Two of each in a batch are the fewest."""
    for repeats in (2, 3, 4):
        for batch_size in range(2 * repeats, 40):
            _, ids = RepeatedOrder(SampleOrder(1000, 0), repeats, batch_size).ids(0, 24 * batch_size)
            batches = ids.reshape(-1, batch_size)
            assert (np.diff(batches, axis=1) != 0).all()


def test_golden_repeats():
    """A change here breaks the resuming of every run that users have: it needs a new format version."""
    order = RepeatedOrder(SampleOrder(6, 0), 3, 8)
    plain = SampleOrder(6, 0).ids(0, 6).ids.tolist()
    assert order.ids(0, 8).ids.tolist() == [plain[i] for i in (0, 1, 2, 0, 1, 2, 0, 1)]
    assert order.ids(0, 8).epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert order.ids(8, 16).ids.tolist() == [plain[i] for i in (3, 4, 5, 3, 4, 2, 3, 4)]
    assert order.ids(8, 16).epochs.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert order.ids(18, 24).epochs.tolist() == [1, 4, 4, 2, 5, 5]


def test_one_repeat_is_the_order_itself():
    order = SampleOrder(97, 5)
    assert np.array_equal(RepeatedOrder(order, 1, 10).ids(7, 300), order.ids(7, 300))
    assert RepeatedOrder(order, 3, 10).num_samples == 3 * 97


def test_a_repeated_order_far_on_is_computed_by_pieces():
    order = RepeatedOrder(SampleOrder(400_000_000, 0, [10_000] * 40_000), 3, 4096)
    _, ids = order.ids(10**9 // 4096 * 4096, (10**9 // 4096 + 1) * 4096)
    assert 1365 <= len(np.unique(ids)) <= 1367


def test_a_repeated_order_pickles():
    order = RepeatedOrder(SampleOrder(97, 5), 3, 12)
    assert np.array_equal(pickle.loads(pickle.dumps(order)).ids(5, 40), order.ids(5, 40))


@pytest.mark.parametrize(("repeats", "batch_size"), [(0, 8), (-1, 8), (3, 5), (2, 1)])
def test_bad_repeats(repeats: int, batch_size: int):
    with pytest.raises(UsageError, match="cannot contain two samples"):
        RepeatedOrder(SampleOrder(10, 0), repeats, batch_size)
