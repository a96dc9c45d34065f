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
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.tar.reader import ShardReader
from data_tools.tar.writer import ShardWriter
from mmvit.data.batches import MAX_BAD_IN_A_ROW, Batch, BatchSplit, DataConfig, TrainBatches
from mmvit.data.curriculum import Stage, stage_at
from mmvit.data.patches import PatchBudget, pack_patches
from mmvit.data.shards import IndexedShards
from mmvit.data.stored import StoredEmbeddings
from mmvit.data.tokenizers import Tokenizer
from mmvit.data.transforms import AugmentConfig, eval_pixels
from mmvit.layers.patch_embedding import Patches

NUM_SAMPLES, BATCH_SIZE = 22, 8
COLOURS = ("red", "green", "blue", "Red")
BROKEN = (3, 4, 10, 17)

BatchesOf = Callable[..., TrainBatches]
WriteSquares = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def broken(write_squares: WriteSquares, tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    return IndexedShards(write_squares(tmp_path_factory.mktemp("broken"), BROKEN))


def rows(images: torch.Tensor | Patches) -> list[tuple[torch.Tensor, ...]]:
    """What each sample has of the images."""
    return list(zip(*images, strict=True)) if isinstance(images, Patches) else [(image,) for image in images]


def number_of(key: str) -> int:
    return int(key.rpartition("key")[2])


def assert_equal(first: Batch, second: Batch) -> None:
    for one, other in zip(rows(first.images), rows(second.images), strict=True):
        assert all(map(torch.equal, one, other))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.groups, second.groups)
    assert torch.equal(first.positions, second.positions)
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


def test_d4_repeated_samples_are_changed_anew(squares: IndexedShards, batches_of: BatchesOf):
    batch = batches_of(squares, data={"repeats": 2})[0]
    assert Counter(Counter(batch.keys).values()) == {2: BATCH_SIZE // 2}
    assert len({image.numpy().tobytes() for image in batch.images}) == BATCH_SIZE
    assert batch.keys[: BATCH_SIZE // 2] == batches_of(squares)[0].keys[: BATCH_SIZE // 2]
    with pytest.raises(UsageError, match="cannot contain two samples 5 times"):
        batches_of(squares, data={"repeats": 5})


def test_every_sample_is_used_once_in_each_of_ten_epochs(squares: IndexedShards, batches_of: BatchesOf):
    """Batches of 8 reach over the ends of epochs of 22."""
    data = batches_of(squares, image_size=4)
    used = [key for step in range(-(-10 * NUM_SAMPLES // BATCH_SIZE)) for key in data[step].keys]
    epochs = [used[start : start + NUM_SAMPLES] for start in range(0, 10 * NUM_SAMPLES, NUM_SAMPLES)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(sorted(squares.key(i) for i in range(NUM_SAMPLES)))}
    assert len({tuple(epoch) for epoch in epochs}) == 10  # each in an order of its own


def contents(batch: Batch, pad: int) -> list[tuple[object, ...]]:
    """All of each sample; padding of texts, which depends on the others in a batch, is left out."""
    taught = zip(*batch.teacher, strict=True) if batch.teacher else [()] * len(batch.keys)
    columns = (batch.keys, batch.positions.tolist(), rows(batch.images), taught, batch.groups.tolist(), batch.ids)
    return [
        (
            key,
            position,
            [row.numpy().tobytes() for row in (*image, *teacher)],
            groups,
            [text[text != pad].tolist() for text in ids],
        )
        for key, position, image, teacher, groups, ids in zip(*columns, strict=True)
    ]


STAGES = [Stage(0.4, image_size=8, text_tokens=5), Stage(0.6, text_tokens=4), Stage(1.0)]
KINDS: dict[str, dict[str, Any]] = {
    "squares": {},
    "stages": {"stages": STAGES, "num_steps": 4},
    "patches": {"data": {"patch_budget": 20}, "patch_size": 4},
    "repeats": {"data": {"repeats": 2}},
    "embeddings": {},  # filled in by the fixture
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, embedded_squares: Path) -> dict[str, Any]:
    if request.param != "embeddings":
        return KINDS[request.param]
    teacher = StoredEmbeddings(embedded_squares)
    return {"data": {"image_embeddings": str(embedded_squares)}, "teacher": teacher, "stages": [Stage(text_tokens=6)]}


@pytest.mark.parametrize(("world_size", "micro_batches"), list(itertools.product((1, 2, 4), (1, 2))))
@pytest.mark.parametrize("damage", [False, True])
def test_the_parts_of_any_layout_are_the_batch(
    squares: IndexedShards,
    broken: IndexedShards,
    batches_of: BatchesOf,
    square_words: Tokenizer,
    kind: dict[str, Any],
    *,
    world_size: int,
    micro_batches: int,
    damage: bool,
):
    shards = broken if damage else squares
    splits = [BatchSplit(rank, world_size, micro_batches) for rank in range(world_size)]
    ranks = [batches_of(shards, split=split, **kind) for split in splits]
    for step in (0, 1, 2, 1000):  # step 2 reaches over the end of the epoch
        whole = batches_of(shards, **kind)[step]
        parts = [rank[step * micro_batches + micro] for rank in ranks for micro in range(micro_batches)]
        assert {len(part.keys) for part in parts} == {BATCH_SIZE // world_size // micro_batches}
        together = [sample for part in parts for sample in contents(part, square_words.pad)]
        assert together == contents(whole, square_words.pad)
        assert sum(part.num_cut for part in parts) == whole.num_cut
        assert [error.key for part in parts for error in part.bad] == [error.key for error in whole.bad]


def test_resuming_anywhere_gives_the_next_batches(broken: IndexedShards, batches_of: BatchesOf, kind: dict[str, Any]):
    rng = random.Random(0)
    settings = kind | {"batch_size": 4, "num_steps": 40}
    undisturbed = batches_of(broken, **settings)
    expected = [undisturbed[step] for step in range(40)]
    for step in [rng.randrange(38) for _ in range(20)]:
        resumed = batches_of(pickle.loads(pickle.dumps(broken)), **settings)
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
    with pytest.raises(UsageError, match="is not divisible by 2 ranks x 3 micro-batches"):
        batches_of(squares, split=BatchSplit(0, 2, 3))


def test_a_batch_larger_than_the_data_is_refused(squares: IndexedShards, batches_of: BatchesOf):
    with pytest.raises(UsageError, match="a global batch of 23 is larger than the data set of 22 samples") as caught:
        batches_of(squares, batch_size=23)
    assert caught.value.where == "train.batch_size"
    assert "train.batch_size=22 or less" in caught.value.hint
    assert len(set(batches_of(squares, batch_size=22)[0].keys)) == 22


def test_stages_change_sizes_and_lengths_and_nothing_else(
    squares: IndexedShards, batches_of: BatchesOf, square_words: Tokenizer
):
    plain, staged = batches_of(squares), batches_of(squares, stages=STAGES, num_steps=10)
    for step in range(10):
        stage = stage_at(step, 10, STAGES)
        batch, expected = staged[step], plain[step]
        size = stage.image_size or 16
        assert batch.images.shape == (BATCH_SIZE, 3, size, size)
        assert batch.keys == expected.keys
        assert torch.equal(batch.groups, expected.groups)
        length = stage.text_tokens or 40
        assert batch.ids.shape[2] == min(length, expected.ids.shape[2])
        assert (batch.ids == square_words.end_of_text).sum(dim=2).eq(1).all()
        lengths = (expected.ids != square_words.pad).sum(dim=2)
        assert batch.num_cut == (lengths > length).sum()
        assert (batch.num_cut > 0) == (stage.text_tokens is not None)
        if step >= 6:
            assert torch.equal(batch.images, expected.images)


def test_positions_never_come_again(squares: IndexedShards, batches_of: BatchesOf):
    splits = [BatchSplit(rank, 2, 2) for rank in range(2)]
    parts = [batches_of(squares, split=split) for split in splits]
    found = [part[number].positions for number in range(12) for part in parts]
    assert sorted(torch.cat(found).tolist()) == list(range(6 * BATCH_SIZE))
    for part in parts:
        for number in range(12):
            batch = part[number]
            ids = [int(part.order.ids(position, position + 1).ids[0]) for position in batch.positions.tolist()]
            assert batch.keys == [squares.key(i) for i in ids]


def test_patches_keep_the_shape_of_their_pictures(
    squares: IndexedShards, batches_of: BatchesOf, drawing: Callable[[int], bytes]
):
    data = {"patch_budget": 30, "augment": AugmentConfig(crop_area=None), "decode": "exact"}
    batch = batches_of(squares, data, patch_size=4)[0]
    budget = PatchBudget(30, 4)
    originals = [Image.open(io.BytesIO(drawing(number_of(key)))).convert("RGB") for key in batch.keys]
    expected = pack_patches([eval_pixels(original, budget) for original in originals], budget)
    assert torch.equal(batch.images.pixels, expected.pixels)
    assert torch.equal(batch.images.grids, expected.grids)
    assert batch.images.pixels.shape == (BATCH_SIZE, 30, 48)
    assert len({tuple(grid) for grid in batch.images.grids.tolist()}) > 1


def test_stored_embeddings_stand_in_for_images_that_nobody_reads(
    squares: IndexedShards, batches_of: BatchesOf, embedded_squares: Path, monkeypatch: pytest.MonkeyPatch
):
    stored = StoredEmbeddings(embedded_squares)
    data = batches_of(squares, {"image_embeddings": str(embedded_squares)}, teacher=stored)
    asked = []
    fields = ShardReader.fields
    monkeypatch.setattr(
        ShardReader, "fields", lambda self, *where: asked.append(found := fields(self, *where)) or found
    )
    for step in range(3):
        batch = data[step]
        rows = [stored.row(key) for key in batch.keys]
        assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.float32, (BATCH_SIZE, 6))
        assert np.array_equal(batch.images, np.stack([stored.image(row) for row in rows]))
        assert np.array_equal(batch.teacher.image, batch.images)
        assert np.array_equal(batch.teacher.text, np.stack([stored.text(row) for row in rows]))
        assert batch.ids.shape[:2] == (BATCH_SIZE, 2)
    assert {tuple(found) for found in asked} == {("json", "txt")}


def test_a_sample_without_an_embedding_is_a_bad_one(
    write_squares: WriteSquares, batches_of: BatchesOf, embedded_squares: Path, tmp_path: Path
):
    shards = IndexedShards(write_squares(tmp_path, num_samples=27))
    for own in ({"data": {"image_embeddings": str(embedded_squares)}}, {"teacher": StoredEmbeddings(embedded_squares)}):
        batch = batches_of(shards, batch_size=27, **own)[0]
        assert {(error.key, error.cause) for error in batch.bad} == {(f"key{i}", "no-embedding") for i in range(22, 27)}
        assert {error.shard for error in batch.bad} == {str(shards.paths[2])}
        assert all(number_of(key) < 22 for key in batch.keys)


def test_settings_that_contradict_each_other_are_refused(
    squares: IndexedShards, batches_of: BatchesOf, embedded_squares: Path, embed: Callable[..., Path], tmp_path: Path
):
    stored, budget = {"image_embeddings": str(embedded_squares)}, {"patch_budget": 20}
    sized = {"stages": [Stage(image_size=8)], "patch_size": 4}
    with pytest.raises(UsageError, match=r"leaves no image to which data.patch_budget could apply"):
        batches_of(squares, stored | budget, patch_size=4)
    for key, data in (("data.patch_budget", budget), ("data.image_embeddings", stored)):
        with pytest.raises(UsageError, match=f"a stage has an image_size, and with {key} images have none"):
            batches_of(squares, data, **sized)
    texts = embed(str(squares.paths[0].path.parent), tmp_path / "texts", "text")
    with pytest.raises(UsageError, match="are of texts only") as caught:
        batches_of(squares, {"image_embeddings": str(texts)})
    assert caught.value.where == "data.image_embeddings"
    with pytest.raises(UsageError, match="are of texts only") as caught:
        batches_of(squares, teacher=StoredEmbeddings(texts))
    assert caught.value.where == "loss.teacher"


def test_pixels_of_a_batch_are_its_samples(
    squares: IndexedShards, square_words: Tokenizer, drawing: Callable[[int], bytes]
):
    config = DataConfig(augment=AugmentConfig(crop_area=None))
    batch = TrainBatches(squares, config, square_words, image_size=16, batch_size=4, num_steps=1, seed=0)[0]
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
    with pytest.raises(DataError, match=f"{MAX_BAD_IN_A_ROW} samples in a row are invalid") as caught:
        batches_of(shards)[0]
    assert not isinstance(caught.value, SampleError)  # no batch can be made: the run ends
    assert "cannot be decoded" in caught.value.what
    assert str(shards.paths[0]) in caught.value.where
    assert caught.value.exit_code == 3


def test_images_without_classes_have_no_labels(squares: IndexedShards):
    batch = TrainBatches(squares, DataConfig(), None, image_size=16, batch_size=4, num_steps=1, seed=0)[0]
    assert batch.labels is None
    assert not batch.bad
