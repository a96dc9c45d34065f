"""A training batch is a function of seed and step: not of processes, workers or what was read before."""

import io
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import DataError
from data_tools.shard_writer import ShardWriter
from data_tools.tokenizer import train_tokenizer
from mmvit.data.batches import Batch, DataConfig, TrainBatches, iterate_batches
from mmvit.data.captions import CaptionConfig
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer
from mmvit.data.transforms import AugmentConfig

NUM_SAMPLES, BATCH_SIZE = 22, 8
COLOURS = ("red", "green", "blue", "Red")


def drawing(i: int) -> bytes:
    image = Image.new("RGB", (24 + i, 30), COLOURS[i % 4].lower())
    image.paste((0, 0, 0), (i % 9, 3, i % 9 + 8, 12))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    with ShardWriter(tmp_path_factory.mktemp("shards"), max_samples=9) as writer:
        for i in range(NUM_SAMPLES):
            meta = {"names": {"long": f"a {COLOURS[i % 4]} square number {i}"}}
            writer.write(f"key{i}", {"png": drawing(i), "txt": COLOURS[i % 4], "json": meta})
    return IndexedShards(writer.shards)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["a photo of a red green blue square number"], path, vocab_size=300)
    return build_tokenizer(TokenizerConfig("file", str(path)), 40)


def batches(shards: IndexedShards, tokenizer: Tokenizer, **changes) -> TrainBatches:
    captions = [CaptionConfig(templates=["{}", "a photo of a {}"]), CaptionConfig("names.long")]
    config = DataConfig(captions=captions, augment=AugmentConfig(rotate=20.0, shift=0.1, brightness=0.2))
    settings = {"image_size": 16, "batch_size": BATCH_SIZE, "seed": 5} | changes
    return TrainBatches(shards, config, tokenizer, **settings)


def assert_equal(first: Batch, second: Batch) -> None:
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a, b)
    assert first.keys == second.keys


def test_a_step_is_the_same_whenever_it_is_read(shards: IndexedShards, tokenizer: Tokenizer):
    one, other = batches(shards, tokenizer), batches(shards, tokenizer)
    expected = [one[step] for step in range(4)]
    for step in (3, 0, 2):
        assert_equal(other[step], expected[step])
    assert expected[0].images.shape == (BATCH_SIZE, 3, 16, 16)
    assert expected[0].images.dtype == torch.uint8
    assert expected[0].ids.shape[:2] == (BATCH_SIZE, 2)


def test_seed_and_epoch_change_what_is_drawn(shards: IndexedShards, tokenizer: Tokenizer):
    assert batches(shards, tokenizer)[0].keys != batches(shards, tokenizer, seed=6)[0].keys
    whole = batches(shards, tokenizer, batch_size=NUM_SAMPLES)
    first, second = ({key: (whole[step].images[i]) for i, key in enumerate(whole[step].keys)} for step in (0, 1))
    assert first.keys() == second.keys()
    assert list(first) != list(second)
    assert not any(torch.equal(first[key], second[key]) for key in first)


def test_every_sample_is_used_once_an_epoch(shards: IndexedShards, tokenizer: Tokenizer):
    """Eleven steps of 8 are four epochs of 22, with batches over the ends of epochs."""
    data = batches(shards, tokenizer)
    keys = [key for step in range(11) for key in data[step].keys]
    assert set(Counter(keys).values()) == {4}
    assert len(set(keys[:NUM_SAMPLES])) == len(set(keys[NUM_SAMPLES : 2 * NUM_SAMPLES])) == NUM_SAMPLES


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_processes_parts_are_the_batch(shards: IndexedShards, tokenizer: Tokenizer, world_size: int):
    for step in (0, 2):  # step 2 reaches over the end of the epoch
        whole = batches(shards, tokenizer)[step]
        parts = [batches(shards, tokenizer, rank=rank, world_size=world_size)[step] for rank in range(world_size)]
        assert [key for part in parts for key in part.keys] == whole.keys
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.groups for part in parts]), whole.groups)
        length = whole.ids.shape[2]
        padded = [torch.nn.functional.pad(p.ids, (0, length - p.ids.shape[2]), value=tokenizer.pad) for p in parts]
        assert torch.equal(torch.cat(padded), whole.ids)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_processes_positions_part_the_batch(shards: IndexedShards, tokenizer: Tokenizer, world_size: int):
    for step in (0, 1, 2, 1000):
        ranks = [batches(shards, tokenizer, rank=rank, world_size=world_size) for rank in range(world_size)]
        parts = [data.positions(step) for data in ranks]
        assert {len(part) for part in parts} == {BATCH_SIZE // world_size}
        together = [position for part in parts for position in part]
        assert together == list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))


def test_a_copy_sent_to_a_worker_gives_the_same_batch(shards: IndexedShards, tokenizer: Tokenizer):
    """Processes that are spawned, not forked, get the data set pickled."""
    data = batches(shards, tokenizer)
    assert_equal(pickle.loads(pickle.dumps(data))[2], data[2])


def test_groups_are_equal_where_the_bare_captions_are(shards: IndexedShards, tokenizer: Tokenizer):
    data = batches(shards, tokenizer, batch_size=NUM_SAMPLES)[0]
    numbers = [int(key.rpartition("key")[2]) for key in data.keys]
    colours = [COLOURS[number % 4].lower() for number in numbers]
    same_colour = torch.tensor([[a == b for b in colours] for a in colours])
    by_caption, by_name = data.groups.T
    assert torch.equal(by_caption[:, None] == by_caption[None, :], same_colour)
    assert torch.equal(by_name[:, None] == by_name[None, :], torch.eye(NUM_SAMPLES, dtype=torch.bool))
    assert len({tuple(row) for row in data.ids[:, 0].tolist()}) > len(set(colours))  # whatever the templates


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_change_nothing(shards: IndexedShards, tokenizer: Tokenizer, num_workers: int):
    data = batches(shards, tokenizer)
    found = list(iterate_batches(data, range(3, 8), num_workers))
    assert len(found) == 5
    for step, batch in zip(range(3, 8), found, strict=True):
        assert_equal(batch, data[step])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named_when_its_turn_comes(tmp_path: Path, tokenizer: Tokenizer, num_workers: int):
    with ShardWriter(tmp_path) as writer:
        for i in range(8):
            image = drawing(i)[:-30] if i == 5 else drawing(i)
            writer.write(f"key{i}", {"png": image, "txt": "red", "json": {"names": {"long": "a"}}})
    data = batches(IndexedShards(writer.shards), tokenizer, batch_size=2)
    found = []
    with pytest.raises(DataError, match="image cannot be decoded") as caught:
        found.extend(iterate_batches(data, range(4), num_workers))
    assert caught.value.where == "shard-00000.tar/key5"
    assert caught.value.exit_code == 3
    assert len(found) == data.order.epoch(0).tolist().index(5) // 2


def test_pixels_of_a_batch_are_its_samples(shards: IndexedShards, tokenizer: Tokenizer):
    config = DataConfig(augment=AugmentConfig(crop_area=None))
    batch = TrainBatches(shards, config, tokenizer, image_size=16, batch_size=4, seed=0)[0]
    for key, image in zip(batch.keys, batch.images, strict=True):
        original = Image.open(io.BytesIO(drawing(int(key.rpartition("key")[2])))).convert("RGB")
        expected = np.asarray(original.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(image.numpy(), expected)
