"""Stored embeddings are found by the keys of their samples, however the shards are ordered, and nothing is guessed."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.core.errors import CheckpointError, DataError
from data_tools.sample.content import FaultError
from data_tools.tar.expand import expand_shards
from mmvit.data.shards import IndexedShards
from mmvit.data.stored import StoredEmbeddings
from mmvit.retrieval.store import open_embeddings

NUM_SAMPLES = 22

Embed = Callable[..., Path]
WriteSquares = Callable[..., list[Path]]


def test_each_sample_finds_its_row(squares: IndexedShards, embedded_squares: Path):
    stored = StoredEmbeddings(embedded_squares)
    folder = open_embeddings(embedded_squares)
    assert (stored.model_sha256, stored.dim, stored.kinds) == ("c" * 64, 6, ("img", "text"))
    images, texts = (np.concatenate(folder.vectors[kind]) for kind in ("img", "text"))
    assert len(folder.vectors["img"]) == 4  # parts
    assert len({row.tobytes() for row in images}) > 10
    keys = folder.metadata["image_path"].to_pylist()
    for i in reversed(range(NUM_SAMPLES)):
        row = stored.row(squares.key(i))
        assert keys[row] == squares.key(i)
        assert stored.image(row).dtype == np.float32
        assert np.array_equal(stored.image(row), images[row])
        assert np.array_equal(stored.text(row), texts[row])


def test_a_copy_sent_to_a_worker_reads_the_same(embedded_squares: Path):
    stored = StoredEmbeddings(embedded_squares)
    stored.image(3)
    data = pickle.dumps(stored)
    assert len(data) < 5000  # no vectors
    assert np.array_equal(pickle.loads(data).image(20), stored.image(20))


def test_few_files_stay_open(embedded_squares: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mmvit.data.stored._OPEN_PARTS", 1)
    stored = StoredEmbeddings(embedded_squares)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for row in range(NUM_SAMPLES):
        stored.image(row)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_sample_without_a_row_is_named(embedded_squares: Path):
    with pytest.raises(FaultError, match=r"it has no row in .*squares") as caught:
        StoredEmbeddings(embedded_squares).row("shard-00000.tar/d/other")
    assert caught.value.fault.cause == "no-embedding"


def test_embeddings_of_other_data_are_refused(
    squares: IndexedShards,
    embedded_squares: Path,
    write_squares: WriteSquares,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    stored = StoredEmbeddings(embedded_squares)
    with caplog.at_level(logging.WARNING):
        stored.check_made_of(squares)
    assert not caplog.text
    # Half of the samples may be missing: they are left out later.
    stored.check_made_of(IndexedShards(write_squares(tmp_path / "double", num_samples=44)))
    assert "computed from other shards, or the shards have changed since" in caplog.text
    more = IndexedShards(write_squares(tmp_path / "more", num_samples=45))
    with pytest.raises(DataError, match=r"23 of 45 samples have no row .* such as shard-00002\.tar/key22") as caught:
        stored.check_made_of(more)
    assert caught.value.where == str(embedded_squares)
    assert caught.value.note == "its 22 rows are of other data, such as shard-00000.tar/key0"


def test_two_samples_of_one_name_are_refused(write_squares: WriteSquares, embed: Embed, tmp_path: Path):
    for name in ("a", "b"):
        write_squares(tmp_path / name, num_samples=9)
    (tmp_path / "b" / "shard-00000.tar").rename(tmp_path / "b" / "shard-00001.tar")
    out = embed(f"{tmp_path}/[ab]/*.tar", tmp_path / "out")
    assert len(StoredEmbeddings(out)._names) == 18
    shutil.rmtree(out)
    (tmp_path / "b" / "shard-00001.tar").rename(tmp_path / "b" / "shard-00000.tar")
    embed(f"{tmp_path}/[ab]/*.tar", out)
    stored = StoredEmbeddings(out)
    shards = IndexedShards(expand_shards(f"{tmp_path}/[ab]/*.tar"), require_caption=False)
    assert [stored.row(shards.key(i)) for i in range(18)] == list(range(18)), "the folder tells them apart"
    for path in (out / "metadata").iterdir():
        table = pq.read_table(path)
        names = [name.removeprefix("a/").removeprefix("b/") for name in table["image_path"].to_pylist()]
        pq.write_table(table.set_column(0, "image_path", [names]), path)  # as it was written without the folder
    with pytest.raises(DataError, match=r"9 rows have the key of another row, such as shard-00000.tar/key"):
        StoredEmbeddings(out)


def test_folders_that_are_none_or_damaged_are_refused(embedded_squares: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="not an embedding folder"):
        StoredEmbeddings(tmp_path)
    folder = Path(shutil.copytree(embedded_squares, tmp_path / "copy"))
    (folder / "img_emb" / "img_emb_2.npy").unlink()
    with pytest.raises(CheckpointError, match="img_emb has 15 rows and the metadata 22"):
        StoredEmbeddings(folder)
    (folder / "manifest.json").write_text(json.dumps({"format_version": 2, "modality": "both"}))
    with pytest.raises(CheckpointError, match="format version 2"):
        StoredEmbeddings(folder)


def test_images_alone_have_no_texts(squares: IndexedShards, embed: Embed, tmp_path: Path):
    folder = embed(str(squares.paths[0].path.parent), tmp_path / "out", "image")
    assert StoredEmbeddings(folder).kinds == ("img",)
