"""Labelled files are read like samples of shards, wherever they lie; what is wrong with one is told and counted."""

import io
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.sample.decode import decode_image
from mmvit.data import folders
from mmvit.data.batches import DataConfig, TrainBatches
from mmvit.data.folders import LabelledFiles, list_class_folders, list_json_labels
from mmvit.data.labels import Labelled, open_labelled
from mmvit.data.loader import Loader

NAMES = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SUFFIXES = [".png", ".jpg", ".webp", ".JPEG"]

Digits = list[tuple[int, bytes]]


def encoded(png: bytes, suffix: str) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).save(file, {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG"))
    return file.getvalue()


@pytest.fixture
def tree(tmp_path: Path, digits: Digits) -> Path:
    """Sixty digits in class folders, some deeper, in all formats."""
    for i, (digit, png) in enumerate(digits[:60]):
        folder = tmp_path / "tree" / DIGITS[digit] / ("more" if i % 3 == 0 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}{SUFFIXES[i % 4]}").write_bytes(encoded(png, SUFFIXES[i % 4]))
    return tmp_path / "tree"


def opened(root: Path) -> Labelled:
    return open_labelled([str(root)])


def by_name(labelled: Labelled) -> dict[str, str]:
    samples = labelled.samples
    return {samples.key(i): labelled.class_names[samples.labels[i]] for i in range(samples.num_samples)}


def test_a_folder_a_class(tree: Path, digits: Digits):
    samples, names = opened(tree)
    assert names == NAMES
    assert samples.num_samples == 60
    assert samples.shard_sizes == (60,)
    for i in range(60):
        sample = samples.read(i)
        number = int(Path(sample.key).stem)
        digit, png = digits[number]
        assert sample.image == (tree / sample.key).read_bytes() == encoded(png, SUFFIXES[number % 4])
        assert names[sample.label] == DIGITS[digit] == sample.key.split("/")[0]
        assert samples.labels[i] == sample.label
        assert (sample.caption, sample.meta) == (None, None)
        assert decode_image(sample.image).size == (8, 8)
    assert opened(tree).counts() == [sum(name == DIGITS[digit] for digit, _ in digits[:60]) for name in NAMES]
    assert samples.read(3, image=False).image == b""
    with pytest.raises(IndexError):
        samples.read(60)


def test_hidden_other_and_linked_files_stay_outside(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    before = by_name(opened(tree))
    (tree / ".git").mkdir()
    (tree / "one" / ".DS_Store").touch()
    (tree / ".hidden.png").touch()
    assert not caplog.text
    (tree / "one" / "notes.txt").touch()
    (tree / "one" / "scan.tiff").touch()
    (tree / "loose.png").touch()
    (tree / "linked").symlink_to(tree / "one", target_is_directory=True)
    assert by_name(opened(tree)) == before
    assert "skipped: 3 x hidden, " in caplog.text
    for what in (".txt", ".tiff", "image in no class folder", "link to a folder"):
        assert f"1 x {what}" in caplog.text


def test_files_that_cannot_be_read_are_sample_errors(tree: Path, tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tree / "one" / "a_secret.png").symlink_to(tmp_path / "secret.png")
    (tree / "one" / "b_inside.png").symlink_to(min((tree / "zero").glob("*.*")))
    (tree / "one" / "c_gone.png").symlink_to(tree / "gone.png")
    (tree / "one" / "d_empty.png").touch()
    os.mkfifo(tree / "one" / "e_pipe.png")
    samples = opened(tree).samples
    numbers = {samples.key(i): i for i in range(samples.num_samples)}
    assert samples.read(numbers["one/b_inside.png"]).image == min((tree / "zero").glob("*.*")).read_bytes()
    for key, what in {
        "one/a_secret.png": "outside of the folder",
        "one/c_gone.png": "No such file",
        "one/d_empty.png": "empty file",
        "one/e_pipe.png": "not a file but a pipe",
    }.items():
        with pytest.raises(SampleError, match=what) as caught:
            samples.read(numbers[key])
        assert (caught.value.cause, caught.value.where) == ("no-image", f"{tree}, key {key!r}")
        assert pickle.loads(pickle.dumps(caught.value)).hint is None  # `mmvit-data repair` repairs shards
    assert samples.lost() == []


def test_a_file_that_is_too_large_is_not_read(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(folders.MAX_BYTES, "jpg", 20)
    with pytest.raises(SampleError, match="more than 20") as caught:
        opened(tree).samples.read(0)
    assert caught.value.cause == "too-large"


def test_folders_that_are_no_classes(tmp_path: Path, tree: Path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").touch()
    with pytest.raises(UsageError, match="no class folders"):
        opened(tmp_path / "flat")
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "val").mkdir()
    with pytest.raises(UsageError, match="part of a data set, not a class") as caught:
        opened(tmp_path / "set")
    assert str(tmp_path / "set" / "train") in str(caught.value.hint)
    (tree / "ten" / "empty").mkdir(parents=True)
    (tree / "ten" / "notes.txt").touch()
    with pytest.raises(DataError, match="1 of 11 class folders contain no image: ten"):
        opened(tree)


def test_a_class_whose_name_cannot_be_shown_is_refused(tree: Path):
    (tree / "one").rename(tree / "one\ntwo")
    with pytest.raises(DataError, match=r"cannot be shown.*'one\\ntwo'"):
        opened(tree)


def test_fingerprint_covers_names_sizes_and_labels(tree: Path, tmp_path: Path):
    first = opened(tree).samples.fingerprint()
    assert opened(tree.rename(tmp_path / "moved")).samples.fingerprint() == first
    tree = tmp_path / "moved"
    picture = min((tree / "one").glob("*.*"))
    picture.write_bytes(picture.read_bytes()[::-1])
    assert opened(tree).samples.fingerprint() == first  # content of the same size is not covered
    picture.write_bytes(b"other")
    second = opened(tree).samples.fingerprint()
    assert second != first
    picture.rename(picture.with_name("name.png"))
    third = opened(tree).samples.fingerprint()
    assert third not in (first, second)
    listed = list_class_folders(tree)
    numbers = [NAMES.index(name) for name in listed.labels]
    assert LabelledFiles(tree, listed.files, numbers).fingerprint() == third
    assert LabelledFiles(tree, listed.files, numbers[::-1]).fingerprint() != third


def read_all(samples: LabelledFiles) -> list[tuple[str, int | None, bytes]]:
    return [(sample.key, sample.label, sample.image) for sample in map(samples.read, range(samples.num_samples))]


def test_a_copy_for_another_process_reads_the_same(tree: Path):
    samples = opened(tree).samples
    assert read_all(pickle.loads(pickle.dumps(samples))) == read_all(samples)


def test_training_batches_leave_out_what_is_broken(tree: Path):
    broken = min((tree / "three").glob("*.*"))
    broken.write_bytes(broken.read_bytes()[:40])
    samples, names = opened(tree)
    batches = TrainBatches(samples, DataConfig(), None, image_size=16, batch_size=20, num_steps=9, seed=5)
    with Loader(batches, range(3)) as loader:  # an epoch
        loaded = list(loader)
    bad = [error for batch in loaded for error in batch.bad]
    assert [(error.cause, error.key) for error in bad] == [("bad-image", f"three/{broken.name}")]
    labels = {
        key: names[label] for batch in loaded for key, label in zip(batch.keys, batch.labels.tolist(), strict=True)
    }
    assert labels == {key: key.split("/")[0] for key in labels}
    assert labels.keys() == {samples.key(i) for i in range(60)} - {f"three/{broken.name}"}


@pytest.mark.parametrize("form", ["map", "list", "lines"])
def test_json_labels_in_three_forms(tree: Path, form: str):
    expected = by_name(opened(tree))
    if form == "lines":
        lines = [json.dumps({"file": file, "label": label, "note": 1}) for file, label in expected.items()]
        path = tree / "labels.jsonl"
        path.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    else:
        path = tree / "labels.json"
        rows = [{"label": label, "file": file} for file, label in expected.items()]
        path.write_text(json.dumps(expected if form == "map" else rows))
    labelled = open_labelled([str(path)])
    assert labelled.class_names == NAMES
    assert by_name(labelled) == expected
    assert labelled.samples.read(0).image == (tree / labelled.samples.key(0)).read_bytes()


def test_json_labels_may_be_numbers(tree: Path):
    files = list(by_name(opened(tree)))
    path = tree / "labels.json"
    path.write_text(json.dumps({file: number % 3 for number, file in enumerate(files)}))
    labelled = open_labelled([str(path)], "red,green,blue")
    assert list(labelled.samples.labels[:5]) == [0, 1, 2, 0, 1]
    assert labelled.class_names == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.json", '{"a.png": "x", "a.png": "x"}', "entry 2 lists a file for the second time"),
        ("a.json", '{"a.png": "x", "./a.png": "y"}', "entry 2 lists a file for the second time"),
        ("a.json", '{"a.png": true}', "entry 1 is not a file with a label"),
        ("a.json", '{"a.png": {"x": 1}}', "entry 1 is not a file with a label"),
        ("a.json", '[{"file": "a.png", "class": 3}]', "entry 1 is not a file with a label"),
        ("a.json", "[]", "lists no file"),
        ("a.json", "3", "entry 1 is not a file with a label"),
        ("a.json", '{"a.png": ', "not JSON"),
        ("a.json", "[" * 9999, "not JSON"),
        ("a.jsonl", '{"file": "a.png", "label": 1}\n{"file"', "line 2"),
        ("a.jsonl", '{"a.png": "x"}', "line 1 is not a file with a label"),
        ("a.json", '{"none.png": "x"}', "listed files are missing, such as 'none.png'"),
    ],
)
def test_json_that_is_none(tmp_path: Path, name: str, text: str, what: str):
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        list_json_labels(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.hint


def test_json_that_is_missing_or_leads_outside(tmp_path: Path):
    with pytest.raises(DataError, match="the folder or file does not exist"):
        open_labelled([str(tmp_path / "labels.json")])
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "set").mkdir()

    for outside in ("../secret.png", f"{tmp_path}/secret.png"):
        (tmp_path / "set" / "labels.json").write_text(json.dumps({"a.png": "x", outside: "y"}))
        with pytest.raises(DataError, match="entry 2 refers to a file outside of the folder of the JSON file"):
            open_labelled([str(tmp_path / "set" / "labels.json")])


def test_class_folders_that_are_numbers_keep_them(tmp_path: Path, digits: Digits, caplog: pytest.LogCaptureFixture):
    for number in (0, 2, 10, 11):
        for split in ("train", "val")[: 1 + (number > 2)]:
            folder = tmp_path / "set" / split / f"{number:0{1 + 2 * (number == 2)}d}"
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(digits[0][1])
    caplog.set_level(logging.INFO)
    samples, names = opened(tmp_path / "set" / "train")
    assert {samples.key(i): samples.labels[i] for i in range(4)} == {
        "0/a.png": 0,
        "002/a.png": 2,
        "10/a.png": 10,
        "11/a.png": 11,
    }
    assert names == ["0", "1", "002", *map(str, range(3, 12))]
    assert "class numbers are kept: 0 to 11; no sample for 8 of them: 1, 3, 4, 5, 6 and 3 more" in caplog.text
    words = [f"name {i}" for i in range(12)]
    for known in (names, words):
        samples = open_labelled([str(tmp_path / "set" / "val")], known=known).samples
        assert {samples.key(i): samples.labels[i] for i in range(2)} == {"10/a.png": 10, "11/a.png": 11}
    (tmp_path / "set" / "labels.json").write_text('{"train/0/a.png": "10", "val/10/a.png": "2"}')
    assert list(opened(tmp_path / "set" / "labels.json").samples.labels) == [10, 2]
    (tmp_path / "set" / "val" / "12").mkdir()
    (tmp_path / "set" / "val" / "12" / "a.png").write_bytes(digits[0][1])
    with pytest.raises(DataError, match="the class '12' is not one of the 12 classes"):
        open_labelled([str(tmp_path / "set" / "val")], known=words)
    (tmp_path / "set" / "val" / "12").rename(tmp_path / "set" / "val" / "-1")
    with pytest.raises(UsageError, match="'-1' is a number, and class numbers go from 0"):
        opened(tmp_path / "set" / "val")


def test_folders_that_are_hardly_classes(tmp_path: Path, tree: Path):
    (tmp_path / "more").mkdir()
    tree.rename(tmp_path / "more" / "PetImages")
    with pytest.raises(UsageError, match="'PetImages' is not a class by its name") as caught:
        opened(tmp_path / "more")
    assert str(tmp_path / "more" / "PetImages") in str(caught.value.hint)
    (tmp_path / "more" / "PetImages").rename(tmp_path / "more" / "zoo")
    with pytest.raises(UsageError, match="there is only one class folder, 'zoo'"):
        opened(tmp_path / "more")
    assert open_labelled([str(tmp_path / "more")], "zoo,cat").counts() == [60, 0]
