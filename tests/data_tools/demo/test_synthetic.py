"""Synthetic images: file sizes and spectra like photographs, deterministic for any number of workers."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.core.errors import UsageError
from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from data_tools.tar.index import open_indexes

# Measured on china.jpg and flower.jpg of scikit-learn 1.9: resized (bicubic), encoded by Pillow at quality 87.
PHOTO_BYTES_PER_PIXEL = {(500, 375): (0.301, 0.155), (1600, 1200): (0.176, 0.088)}
PHOTO_SLOPES = (-1.02, -1.17)  # of amplitude over frequency, log-log


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["JPEG"])


def shard_bytes(folder: Path) -> list[bytes]:
    return [tar.read_bytes() for tar in sorted(folder.glob("*.tar"))]


def slope(picture: Image.Image) -> float:
    side = min(picture.size)
    grey = np.asarray(picture.convert("L"), float)[:side, :side]
    window = np.hanning(side)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window[:, None] * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    edges = np.geomspace(0.01, 0.5, 12)
    rings = [power[(frequency >= low) & (frequency < high)].mean() for low, high in itertools.pairwise(edges)]
    return np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(rings), 1)[0] / 2


@pytest.mark.parametrize(("size", "num"), [((500, 375), 40), pytest.param((1600, 1200), 60, marks=pytest.mark.slow)])
def test_bytes_and_frequencies_are_those_of_photographs(size: tuple[int, int], num: int):
    photos = SyntheticPhotos(*size)
    pictures = [photos.jpeg(i) for i in range(num)]
    assert opened(pictures[0]).size == size
    bytes_per_pixel = np.mean([len(picture) for picture in pictures]) / (size[0] * size[1])
    assert bytes_per_pixel == pytest.approx(np.mean(PHOTO_BYTES_PER_PIXEL[size]), rel=0.2)
    if size == (500, 375):
        slopes = [slope(opened(picture)) for picture in pictures]
        assert np.mean(slopes) == pytest.approx(np.mean(PHOTO_SLOPES), abs=0.25)


def test_a_sample_follows_from_seed_and_number():
    photos = SyntheticPhotos(64, 48)
    first = [photos.jpeg(i) for i in range(30)]
    assert len(set(first)) == 30
    assert [SyntheticPhotos(64, 48).jpeg(i) for i in reversed(range(30))] == first[::-1]
    assert SyntheticPhotos(64, 48, seed=1).jpeg(0) != first[0]
    assert len(SyntheticPhotos(64, 48, quality=30).jpeg(0)) < len(first[0])
    assert opened(SyntheticPhotos(1, 1).jpeg(0)).size == (1, 1)


def test_captions_are_words_of_two_languages():
    captions = [SyntheticPhotos(8, 8).caption(i) for i in range(2000)]
    lengths = [len(caption.split()) for caption in captions]
    assert (min(lengths), max(lengths)) == (3, 30)
    assert len(set(lengths)) == 28
    korean = sum("\uac00" <= caption[0] <= "\ud7a3" for caption in captions)
    assert 0.07 < korean / len(captions) < 0.13
    assert sum(caption.startswith("the ") and caption.isascii() for caption in captions) == 2000 - korean
    assert len(set(captions)) > 1500


def test_shards_do_not_change_the_samples_nor_workers_the_bytes(tmp_path: Path):
    photos = SyntheticPhotos(48, 32)
    one = write_synthetic(tmp_path / "one", photos, num_shards=3, num_samples=20, num_workers=1)
    two = write_synthetic(tmp_path / "two", photos, num_shards=3, num_samples=20, num_workers=2)
    assert one == two
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert one["bytes"] == sum(map(len, shard_bytes(tmp_path / "one")))
    write_synthetic(tmp_path / "five", photos, num_shards=5, num_samples=20, num_workers=1)
    sizes, content = [], []
    for name in ("one", "five"):
        indexes = open_indexes(sorted((tmp_path / name).glob("*.tar")))
        sizes.append([len(index) for index in indexes])
        content.append([(index.key(i), index.digest(i, "jpg")) for index in indexes for i in range(len(index))])
    assert sizes == [[6, 7, 7], [4, 4, 4, 4, 4]]
    assert content[0] == content[1]


def test_a_killed_run_resumes(tmp_path: Path):
    photos = SyntheticPhotos(48, 32)
    whole = write_synthetic(tmp_path / "whole", photos, num_shards=3, num_samples=9, num_workers=1)
    assert write_synthetic(tmp_path / "whole", photos, num_shards=3, num_samples=9) == whole | {"was_there": True}
    # as a kill leaves it: one shard not there, one without its index, one half built
    write_synthetic(tmp_path / "cut", photos, num_shards=3, num_samples=9, num_workers=1)
    manifest = tmp_path / "cut" / "shards.json"
    finished = manifest.read_text()
    manifest.write_text(finished[: finished.index('"report"')] + '"report": null}')
    kept = (tmp_path / "cut" / "shard-00000.tar").stat()
    (tmp_path / "cut" / "shard-00001.tar").unlink()
    (tmp_path / "cut" / "shard-00001.tar.idx").unlink()
    (tmp_path / "cut" / "shard-00002.tar.idx").unlink()
    (tmp_path / "cut" / ".shard-00001.tar.tmp-99999999").write_bytes(b"half")
    assert write_synthetic(tmp_path / "cut", photos, num_shards=3, num_samples=9, num_workers=1) == whole
    assert (tmp_path / "cut" / "shard-00000.tar").stat().st_mtime_ns == kept.st_mtime_ns
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("cut", "whole")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("photos", "sizes"),
    [
        (SyntheticPhotos(0, 8), (1, 1)),
        (SyntheticPhotos(8, 20_000), (1, 1)),
        (SyntheticPhotos(8, 8, quality=96), (1, 1)),
        (SyntheticPhotos(8, 8, seed=-1), (1, 1)),
        (SyntheticPhotos(8, 8), (2, 1)),
        (SyntheticPhotos(8, 8), (0, 1)),
    ],
)
def test_bad_numbers_write_nothing(tmp_path: Path, photos: SyntheticPhotos, sizes: tuple[int, int]):
    with pytest.raises(UsageError):
        write_synthetic(tmp_path / "out", photos, num_shards=sizes[0], num_samples=sizes[1])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, data_program: Callable[..., tuple[int, str, str]]):
    (tmp_path / "notes.txt").write_text("mine")
    options = ("--samples", 4, "--width", 8, "--workers", 1, "--height")
    code, _, errors = data_program("synthetic", tmp_path, *options, 8)
    assert code == 2
    assert "contains other files" in errors
    code, output, errors = data_program("synthetic", tmp_path / "out", *options, 8)
    assert (code, errors) == (0, "")
    assert "4 samples in 1 shards" in output
    code, _, errors = data_program("synthetic", tmp_path / "out", *options, 9)
    assert code == 2
    assert "finished work that differs in: height" in errors
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["notes.txt"]
