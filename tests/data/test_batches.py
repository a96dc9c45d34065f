"""A training batch is a function of seed and step: not of processes, workers or what was read before.

That holds for the samples too that stand in for bad ones.
"""

import io
import itertools
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import DataError, SampleError, UsageError
from data_tools.shard_writer import ShardWriter
from mmvit.data.batches import MAX_BAD_IN_A_ROW, Batch, DataConfig, TrainBatches
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import Tokenizer
from mmvit.data.transforms import AugmentConfig

NUM_SAMPLES, BATCH_SIZE = 22, 8
COLOURS = ("red", "green", "blue", "Red")
BROKEN = (3, 4, 10, 17)

BatchesOf = Callable[..., TrainBatches]
WriteSquares = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def broken(write_squares: WriteSquares, tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    return IndexedShards(write_squares(tmp_path_factory.mktemp("broken"), BROKEN))


def number_of(key: str) -> int:
    return int(key.rpartition("key")[2])


def assert_equal(first: Batch, second: Batch) -> None:
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a, b)
    assert first.keys == second.keys
    assert [(error.shard, error.key) for error in first.bad] == [(error.shard, error.key) for error in second.bad]


def test_a_step_is_the_same_whenever_it_is_read(squares: IndexedShards, batches_of: BatchesOf):
    one, other = batches_of(squares), batches_of(squares)
    expected = [one[step] for step in range(4)]
    for step in (3, 0, 2):
        assert_equal(other[step], expected[step])
    assert expected[0].images.shape == (BATCH_SIZE, 3, 16, 16)
    assert expected[0].images.dtype == torch.uint8
    assert expected[0].ids.shape[:2] == (BATCH_SIZE, 2)
    assert not expected[0].bad


def test_seed_and_epoch_change_what_is_drawn(squares: IndexedShards, batches_of: BatchesOf):
    assert batches_of(squares)[0].keys != batches_of(squares, seed=6)[0].keys
    whole = batches_of(squares, batch_size=NUM_SAMPLES)
    first, second = ({key: (whole[step].images[i]) for i, key in enumerate(whole[step].keys)} for step in (0, 1))
    assert first.keys() == second.keys()
    assert list(first) != list(second)
    assert not any(torch.equal(first[key], second[key]) for key in first)


def test_every_sample_is_used_once_in_each_of_ten_epochs(squares: IndexedShards, batches_of: BatchesOf):
    """Batches of 8 reach over the ends of epochs of 22."""
    data = batches_of(squares, image_size=4)
    used = [key for step in range(-(-10 * NUM_SAMPLES // BATCH_SIZE)) for key in data[step].keys]
    epochs = [used[start : start + NUM_SAMPLES] for start in range(0, 10 * NUM_SAMPLES, NUM_SAMPLES)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(sorted(squares.key(i) for i in range(NUM_SAMPLES)))}
    assert len({tuple(epoch) for epoch in epochs}) == 10  # each in an order of its own


def contents(batch: Batch, pad: int) -> list[tuple[str, bytes, list[list[int]]]]:
    """Key, pixels and tokens of each sample; padding, which depends on the others in a batch, is left out."""
    rows = zip(batch.keys, batch.images, batch.ids, strict=True)
    return [(key, image.numpy().tobytes(), [text[text != pad].tolist() for text in ids]) for key, image, ids in rows]


@pytest.mark.parametrize(("world_size", "micro_batches"), list(itertools.product((1, 2, 4), (1, 2))))
@pytest.mark.parametrize("damage", [False, True])
def test_the_parts_of_any_layout_are_the_batch(
    squares: IndexedShards,
    broken: IndexedShards,
    batches_of: BatchesOf,
    square_words: Tokenizer,
    *,
    world_size: int,
    micro_batches: int,
    damage: bool,
):
    shards = broken if damage else squares
    ranks = [
        batches_of(shards, rank=rank, world_size=world_size, micro_batches=micro_batches) for rank in range(world_size)
    ]
    for step in (0, 1, 2, 1000):  # step 2 reaches over the end of the epoch
        whole = batches_of(shards)[step]
        parts = [rank[step * micro_batches + micro] for rank in ranks for micro in range(micro_batches)]
        assert {len(part.keys) for part in parts} == {BATCH_SIZE // world_size // micro_batches}
        together = [sample for part in parts for sample in contents(part, square_words.pad)]
        assert together == contents(whole, square_words.pad)
        assert torch.equal(torch.cat([part.groups for part in parts]), whole.groups)
        assert [error.key for part in parts for error in part.bad] == [error.key for error in whole.bad]


def test_resuming_anywhere_gives_the_next_batches(broken: IndexedShards, batches_of: BatchesOf):
    rng = random.Random(0)
    undisturbed = batches_of(broken, batch_size=4)
    expected = [undisturbed[step] for step in range(40)]
    for step in [rng.randrange(38) for _ in range(100)]:
        resumed = batches_of(pickle.loads(pickle.dumps(broken)), batch_size=4)
        for ahead in (0, 1):
            assert_equal(resumed[step + ahead], expected[step + ahead])


def test_a_copy_sent_to_a_worker_gives_the_same_batch(squares: IndexedShards, batches_of: BatchesOf):
    """Processes that are spawned, not forked, get the data set pickled."""
    data = batches_of(squares)
    assert_equal(pickle.loads(pickle.dumps(data))[2], data[2])


def test_groups_are_equal_where_the_bare_captions_are(squares: IndexedShards, batches_of: BatchesOf):
    data = batches_of(squares, batch_size=NUM_SAMPLES)[0]
    colours = [COLOURS[number_of(key) % 4].lower() for key in data.keys]
    same_colour = torch.tensor([[a == b for b in colours] for a in colours])
    by_caption, by_name = data.groups.T
    assert torch.equal(by_caption[:, None] == by_caption[None, :], same_colour)
    assert torch.equal(by_name[:, None] == by_name[None, :], torch.eye(NUM_SAMPLES, dtype=torch.bool))
    assert len({tuple(row) for row in data.ids[:, 0].tolist()}) > len(set(colours))  # whatever the templates


def test_a_batch_that_does_not_divide_is_refused(squares: IndexedShards, batches_of: BatchesOf):
    with pytest.raises(UsageError, match="does not divide over 2 processes x 3 micro-batches"):
        batches_of(squares, world_size=2, micro_batches=3)


def test_pixels_of_a_batch_are_its_samples(
    squares: IndexedShards, square_words: Tokenizer, drawing: Callable[[int], bytes]
):
    config = DataConfig(augment=AugmentConfig(crop_area=None))
    batch = TrainBatches(squares, config, square_words, image_size=16, batch_size=4, seed=0)[0]
    for key, image in zip(batch.keys, batch.images, strict=True):
        original = Image.open(io.BytesIO(drawing(number_of(key)))).convert("RGB")
        expected = np.asarray(original.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(image.numpy(), expected)


def test_a_bad_sample_is_named_and_another_stands_in(
    squares: IndexedShards, broken: IndexedShards, batches_of: BatchesOf
):
    """All else in the batch is as if nothing were broken."""
    damaged, whole = batches_of(broken, batch_size=NUM_SAMPLES), batches_of(squares, batch_size=NUM_SAMPLES)
    stand_ins = []
    for epoch in range(5):
        batch, expected = damaged[epoch], whole[epoch]
        for i, key in enumerate(expected.keys):
            if number_of(key) in BROKEN:
                assert number_of(batch.keys[i]) not in BROKEN
                stand_ins.append(batch.keys[i])
            else:
                assert batch.keys[i] == key
                assert torch.equal(batch.images[i], expected.images[i])
        assert {error.key for error in batch.bad} == {f"key{i}" for i in BROKEN}
        for error in batch.bad:
            assert error.cause == "bad-image"
            assert "cannot be decoded" in error.what
            shard = broken.paths[int(error.key[3:]) // 9]
            assert (error.shard, error.where) == (str(shard), f"{shard}, key {error.key!r}")
    assert len(set(stand_ins)) > 6  # drawn anew for each sample and epoch


def test_stand_ins_are_part_of_the_format(broken: IndexedShards, batches_of: BatchesOf):
    """A later version must go on with the runs of this one."""
    data = batches_of(broken, batch_size=NUM_SAMPLES)
    found = {}
    for epoch in range(3):
        intended = [broken.key(i) for i in data.order.epoch(epoch)]
        pairs = zip(intended, data[epoch].keys, strict=True)
        found[epoch] = {number_of(a): number_of(b) for a, b in pairs if a != b}
    assert found == {
        0: {3: 1, 4: 20, 10: 11, 17: 5},
        1: {3: 18, 4: 19, 10: 13, 17: 16},
        2: {3: 19, 4: 5, 10: 5, 17: 18},
    }


def test_every_kind_of_bad_sample_is_replaced(tmp_path: Path, batches_of: BatchesOf, drawing: Callable[[int], bytes]):
    png, meta = drawing(0), {"names": {"long": "a"}}
    with ShardWriter(tmp_path) as writer:
        for i in range(6):
            writer.write(f"good{i}", {"png": png, "txt": "red", "json": meta})
        writer.write("picture", {"png": b"no picture", "txt": "red", "json": meta})
        writer.write("caption", {"png": png, "json": meta})
        writer.write("name", {"png": png, "txt": "red", "json": {"names": {}}})
        writer.write("image", {"txt": "red", "json": meta})
        writer.copy("json", {"png": png, "txt": b"red", "json": b"{"})
        writer.copy("utf8", {"png": png, "txt": b"\xff", "json": b"{}"})
    data = batches_of(IndexedShards(writer.shards, require_caption=False), batch_size=12)
    causes = {error.key: error.cause for error in data[0].bad}
    assert causes == {
        **{"picture": "bad-image", "caption": "no-caption", "name": "no-caption", "image": "no-image"},
        **{"json": "bad-json", "utf8": "not-utf8"},
    }
    assert all("/good" in key for key in data[0].keys)
    delivered = Counter(data[0].keys)
    assert delivered.total() == 12
    assert len(delivered) == 6


def test_bytes_that_rot_after_indexing_are_replaced(write_squares: WriteSquares, tmp_path: Path, batches_of: BatchesOf):
    """They decode without an error; the hashes of the index tell."""
    paths = write_squares(tmp_path)
    shards = IndexedShards(paths, verify=True)
    offset, size = shards.reader.indexes[0].locate(4)["txt"]
    with paths[0].open("r+b") as file:
        file.seek(offset)
        text = file.read(size)
        file.seek(offset)
        file.write(text.upper())
    os.utime(paths[0], ns=(shards.reader.indexes[0].header["tar_mtime_ns"],) * 2)
    (error,) = batches_of(shards, batch_size=NUM_SAMPLES)[0].bad
    assert (error.cause, error.key) == ("hash", "key4")
    assert not batches_of(IndexedShards(paths, verify=False), batch_size=NUM_SAMPLES)[0].bad


def test_many_bad_samples_in_a_row_are_no_data(write_squares: WriteSquares, tmp_path: Path, batches_of: BatchesOf):
    shards = IndexedShards(write_squares(tmp_path, broken=range(9), num_samples=9))
    with pytest.raises(DataError, match=f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used") as caught:
        batches_of(shards)[0]
    assert not isinstance(caught.value, SampleError)  # no batch can be made: the run ends
    assert "cannot be decoded" in caught.value.what
    assert str(shards.paths[0]) in caught.value.where
    assert caught.value.exit_code == 3
