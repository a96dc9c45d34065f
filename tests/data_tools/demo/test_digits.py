"""The handwritten digits: the images of scikit-learn, a fixed split, and nothing overwritten."""

import io
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_tools.core.errors import UsageError
from data_tools.demo.digits import NAMES, val_rows, write_digits
from data_tools.tar.expand import expand_shards
from mmvit.data.shards import IndexedShards

DataProgram = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "out"
    assert write_digits(folder) == {"train": 1438, "val": 359, "was_there": False}
    return folder


def opened(folder: Path, split: str) -> IndexedShards:
    return IndexedShards(expand_shards(f"{folder}/{split}-*.tar"), verify=True, require_caption=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".idx"}


def test_all_images_are_there_once_with_their_labels(digits: Path):
    data = load_digits()
    seen: Counter[int] = Counter()
    for split in ("train", "val"):
        shards = opened(digits, split)
        for i in range(len(shards)):
            sample = shards.read(i)
            row = int(sample.key[-4:])
            seen[row] += 1
            assert sample.label == data.target[row]
            with Image.open(io.BytesIO(sample.image)) as picture:
                assert (picture.mode, picture.size) == ("L", (8, 8))
                assert np.abs(np.asarray(picture) * (16 / 255) - data.images[row]).max() < 0.04  # half a level of 255
    assert seen == Counter(range(1797))
    assert (digits / "classes.txt").read_text() == "".join(f"{name}\n" for name in NAMES)


def test_the_split_is_a_fifth_of_each_digit_and_follows_from_the_seed():
    labels = load_digits().target
    chosen = val_rows(labels, 0)
    assert np.bincount(labels[chosen]).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert np.flatnonzero(chosen)[:8].tolist() == [
        2,
        3,
        11,
        13,
        15,
        20,
        21,
        32,
    ]  # of results that are reported: it may never change
    assert not np.array_equal(chosen, val_rows(labels, 1))


def test_equal_seeds_give_equal_bytes(digits: Path, tmp_path: Path):
    write_digits(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits)


def test_a_finished_folder_is_kept_and_an_unfinished_one_rewritten(digits: Path, tmp_path: Path):
    times = {path.name: path.stat().st_mtime_ns for path in digits.iterdir()}
    assert write_digits(digits)["was_there"]
    assert {path.name: path.stat().st_mtime_ns for path in digits.iterdir()} == times
    write_digits(tmp_path)
    manifest = (tmp_path / "shards.json").read_text()
    assert '"report": {' in manifest
    (tmp_path / "shards.json").write_text('{"plan": {"verb": "digits", "seed": 0}, "report": null}')
    (tmp_path / "train-00001.tar").write_bytes(b"half")
    assert not write_digits(tmp_path)["was_there"]
    assert contents(tmp_path) == contents(digits)


def test_another_seed_or_another_use_of_the_folder_is_refused(digits: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="differs in: seed"):
        write_digits(digits, seed=3)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="contains other files"):
        write_digits(tmp_path)


def test_the_verb(digits: Path, data_program: DataProgram):
    code, output, _ = data_program("digits", digits)
    assert (code, output.splitlines()[0]) == (0, f"{digits}: already there")
    assert "1438 images in train, 359 in val" in output


def test_without_scikit_learn(tmp_path: Path, data_program: DataProgram, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, errors = data_program("digits", tmp_path / "out")
    assert code == 2
    assert "pip install 'mmvit[data]'" in errors
    assert not (tmp_path / "out").exists()
