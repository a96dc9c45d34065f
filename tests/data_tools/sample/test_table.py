"""The table of a shard's samples: right values, made once, made again when it is stale."""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data_tools.sample import table as metadata
from data_tools.sample.table import SCHEMA, metadata_path, perceptual_hash
from data_tools.tar.index import open_index
from data_tools.tar.writer import ShardWriter

shard_metadata = functools.partial(metadata.shard_metadata, num_workers=1)

KOREAN = "\ube68\uac04 \uc9d1"


def picture(seed: int = 0, size: tuple[int, int] = (48, 32), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def write_shards(folder: Path, samples: list[dict[str, Any]], max_samples: int = 1000) -> list[Path]:
    with ShardWriter(folder, max_samples=max_samples) as writer:
        for i, fields in enumerate(samples):
            writer.write(f"{i:03d}", fields)
    return writer.shards


SAMPLES = [
    {"png": picture(0), "txt": "a red house", "cls": 3},
    {"jpg": picture(1, (30, 60), "JPEG"), "txt": KOREAN},
    {"png": b"no picture", "txt": "text"},
    {"webp": picture(2, kind="WEBP"), "json": {"caption": "from the metadata"}},
]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards", SAMPLES, max_samples=3)


def test_the_table_holds_what_the_samples_hold(shards: list[Path]):
    table = shard_metadata(shards)
    assert table.column_names == ["shard", "sample", *SCHEMA.names]
    rows = table.to_pylist()
    assert [(row["shard"], row["sample"], row["key"]) for row in rows] == [
        *((str(shards[0]), i, f"00{i}") for i in range(3)),
        (str(shards[1]), 0, "003"),
    ]
    first = {"width": 48, "height": 32, "aspect": 1.5, "image_format": "PNG", "image_bytes": len(picture(0))}
    first |= {"caption": "a red house", "caption_chars": 11, "caption_words": 3, "script": "Latin", "label": 3}
    assert {name: rows[0][name] for name in first} == first
    assert rows[0]["image_sha256"] == open_index(shards[0]).digest(0, "png").hex()
    assert (rows[0]["phash"], rows[0]["bad"]) == (None, None)
    assert (rows[1]["aspect"], rows[1]["script"], rows[1]["label"]) == (0.5, "Hangul", None)
    assert (rows[2]["bad"], rows[2]["width"], rows[2]["caption"]) == ("bad-image", None, "text")
    assert (rows[3]["image_format"], rows[3]["caption"]) == ("WEBP", "from the metadata")


def test_processes_give_the_same_table(shards: list[Path]):
    alone = shard_metadata(shards)
    for shard in shards:
        metadata_path(shard).unlink()
    assert shard_metadata(shards, num_workers=2).equals(alone)


def test_a_table_is_made_once_and_is_plain_parquet(shards: list[Path], monkeypatch: pytest.MonkeyPatch):
    table = shard_metadata(shards)
    assert parquet.read_table(metadata_path(shards[0])).column("key").to_pylist() == ["000", "001", "002"]
    monkeypatch.setattr(metadata, "_make_table", lambda task: pytest.fail("it was made again"))
    assert shard_metadata(shards).equals(table)


def test_a_stale_or_damaged_table_is_made_again(shards: list[Path], tmp_path: Path):
    shard_metadata(shards)
    other = write_shards(tmp_path / "other", [{"png": picture(7), "txt": "another"}])[0]
    for suffix in ("", ".idx"):
        Path(f"{other}{suffix}").replace(f"{shards[0]}{suffix}")
    assert shard_metadata(shards[:1]).column("caption").to_pylist() == ["another"]

    metadata_path(shards[0]).write_bytes(b"PAR1 damaged")
    assert shard_metadata(shards[:1]).column("caption").to_pylist() == ["another"]

    table = parquet.read_table(metadata_path(shards[0]))
    stamp = table.schema.metadata | {b"mmvit.format": b"0"}
    parquet.write_table(table.slice(0, 0).replace_schema_metadata(stamp), metadata_path(shards[0]))
    assert len(shard_metadata(shards[:1])) == 1


def test_the_token_of_a_url_is_not_in_the_table(shards: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "open_indexes", lambda tars: [open_index(shards[0])])
    table = shard_metadata(["https://me:password@host/a.tar?signature=token"])
    assert set(table["shard"].to_pylist()) == {"https://host/a.tar"}


def test_a_language_detector_that_came_later_is_used(shards: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "detector_name", lambda: "none")
    monkeypatch.setattr(metadata, "language_of", lambda text: None)
    assert shard_metadata(shards).column("language").null_count == 4
    monkeypatch.setattr(metadata, "detector_name", lambda: "detector 1")
    monkeypatch.setattr(metadata, "language_of", lambda text: "xx")
    assert shard_metadata(shards).column("language").null_count == 0
    monkeypatch.setattr(metadata, "detector_name", lambda: "none")  # gone again: what it found stays
    assert shard_metadata(shards).column("language").null_count == 0


def test_the_perceptual_hash_is_there_when_it_was_asked_for(shards: list[Path]):
    assert shard_metadata(shards).column("phash").null_count == 4
    hashes = shard_metadata(shards, with_phash=True).column("phash")
    assert hashes.type == pa.uint64()
    assert hashes.null_count == 1  # the image that is none
    assert shard_metadata(shards).column("phash").equals(hashes)


def test_a_cut_picture_is_found_where_it_has_to_be_decoded(tmp_path: Path):
    shards = write_shards(tmp_path, [{"png": picture(0)[:-200], "txt": "a"}])
    assert shard_metadata(shards).column("bad").to_pylist() == [None]
    assert shard_metadata(shards, with_phash=True).column("bad").to_pylist() == ["bad-image"]


def test_bytes_that_changed_since_they_were_indexed_are_told(shards: list[Path]):
    data = bytearray(shards[0].read_bytes())
    offset, _ = open_index(shards[0]).locate(0)["png"]
    data[offset + 40] ^= 1
    shards[0].write_bytes(data)
    rows = shard_metadata(shards[:1]).to_pylist()
    assert [row["bad"] for row in rows] == ["hash", None, "bad-image"]


def test_a_folder_that_cannot_be_written_gives_the_table_all_the_same(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(metadata, "write_atomic", refuse)
    assert len(shard_metadata(shards)) == 4
    assert "cannot be written" in caplog.text


def test_the_perceptual_hash_is_that_of_imagehash():
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    image = Image.fromarray(((x * 3 + y * y // 7) % 256).astype(np.uint8)).convert("RGB")
    assert perceptual_hash(image) == 0x83072B4B9567CA1F  # imagehash 4.3.2


def test_the_perceptual_hash_sees_copies_and_tells_pictures_apart():
    images = [Image.open(io.BytesIO(picture(seed, (96, 64)))).convert("RGB") for seed in range(20)]
    hashes = [perceptual_hash(image) for image in images]
    buffer = io.BytesIO()
    images[0].resize((61, 40)).save(buffer, "JPEG", quality=50)
    assert (perceptual_hash(Image.open(buffer)) ^ hashes[0]).bit_count() <= 8
    assert min((one ^ other).bit_count() for i, one in enumerate(hashes) for other in hashes[:i]) >= 12


def test_the_perceptual_hash_of_a_symmetrical_picture_does_not_hang_on_rounding():
    half = np.random.default_rng(0).integers(0, 255, (32, 16), dtype=np.uint8)
    image = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)).convert("RGB")
    bits = np.unpackbits(np.frombuffer(perceptual_hash(image).to_bytes(8, "big"), np.uint8)).reshape(8, 8)
    assert len(set(bits[:, 1::2].ravel().tolist())) == 1  # the odd frequencies along the width are all 0
