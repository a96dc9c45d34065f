"""One numbering of classes over shards, folders and JSON, and clear words where there is none."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.core.errors import CheckpointError, DataError, SampleError, UsageError
from data_tools.tar.expand import expand_shards
from data_tools.tar.writer import ShardWriter
from mmvit.data import labels as module
from mmvit.data.labels import (
    Labelled,
    LabelledShards,
    check_class_names,
    check_same_classes,
    class_difference,
    open_labelled,
)
from mmvit.data.shards import IndexedShards

Digits = list[tuple[int, bytes]]
WriteDigits = Callable[..., str]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def write(tmp_path: Path, digits: Digits) -> WriteDigits:
    """Write forty digits into shards of fifteen; `cls` makes the content of their label file, None leaves it out."""

    def shards(cls: Callable[[int, int], object] = lambda i, digit: digit, name: str = "shards") -> str:
        with ShardWriter(tmp_path / name, max_samples=15) as writer:
            for i, (digit, png) in enumerate(digits[:40]):
                label = cls(i, digit)
                fields = {"png": png} | ({} if label is None else {"cls": str(label).encode()})
                writer.copy(f"d{i}", fields)
        return str(tmp_path / name)

    return shards


@pytest.fixture
def names_file(tmp_path: Path) -> str:
    (tmp_path / "classes.txt").write_text("\n".join(DIGITS) + "\n")
    return str(tmp_path / "classes.txt")


def all_labels(labelled: Labelled) -> list[int]:
    samples = labelled.samples
    labels = [samples.read(i).label for i in range(samples.num_samples)]
    assert list(samples.labels) == labels
    return labels


def test_numbers_in_shards(write: WriteDigits, names_file: str, digits: Digits):
    labelled = open_labelled([write()], names_file)
    assert labelled.class_names == DIGITS
    assert all_labels(labelled) == [digit for digit, _ in digits[:40]]
    assert labelled.counts() == [[digit for digit, _ in digits[:40]].count(number) for number in range(10)]
    assert all_labels(labelled._replace(samples=pickle.loads(pickle.dumps(labelled.samples))))
    assert isinstance(labelled.samples, LabelledShards)
    assert labelled.samples.shard_sizes == (15, 15, 10)


def test_names_in_shards(write: WriteDigits, names_file: str, digits: Digits):
    folder = write(lambda i, digit: f"{DIGITS[digit]}\n")
    sorted_names = open_labelled([folder])
    assert sorted_names.class_names == sorted(DIGITS)
    assert [sorted(DIGITS)[label] for label in all_labels(sorted_names)] == [DIGITS[digit] for digit, _ in digits[:40]]
    assert all_labels(open_labelled([folder], names_file)) == [digit for digit, _ in digits[:40]]


def test_several_shard_names_are_one_data_set(write: WriteDigits, names_file: str):
    labelled = open_labelled([f"{write()}/*.tar", write(name="more")], names_file)
    assert labelled.samples.num_samples == 80
    assert sum(labelled.counts()) == 80


@pytest.mark.parametrize(
    ("cls", "classes", "kind", "what"),
    [
        (lambda i, digit: digit, "", UsageError, "there are no class names"),
        (lambda i, digit: 10 if i == 17 else digit, DIGITS, DataError, "label 10 is out of range: .* 0 to 9"),
        (lambda i, digit: digit, DIGITS[:5], DataError, "is out of range: .* 0 to 4"),
        (lambda i, digit: "tree" if i == 17 else "one", DIGITS, DataError, "class 'tree' is not one of the 10 classes"),
        (lambda i, digit: "one" if i == 17 else 3, DIGITS, DataError, "names and others are numbers: 'one' and 3"),
        (lambda i, digit: None, DIGITS, DataError, "contain no labels"),
        (lambda i, digit: "", DIGITS, DataError, "contain no labels"),
    ],
)
def test_labels_that_name_no_class(
    write: WriteDigits, cls: Callable[[int, int], object], classes: list[str], kind: type[Exception], what: str
):
    folder = write(cls)
    with pytest.raises(kind, match=what) as caught:
        open_labelled([folder], ",".join(classes))
    error: Any = caught.value
    assert f"{folder}/shard-0000" in error.where
    assert error.hint
    if "17" in what or "tree" in what or "10" in what:
        assert "key 'd17'" in error.where


def test_a_close_name_is_offered(write: WriteDigits):
    with pytest.raises(DataError) as caught:
        open_labelled([write(lambda i, digit: "Three")], ",".join(DIGITS))
    assert caught.value.hint == "did you mean 'three'?"


def test_class_names_that_stand_twice(write: WriteDigits, tmp_path: Path):
    (tmp_path / "twice.txt").write_text("one\ntwo\none\n")
    with pytest.raises(UsageError, match="duplicate class names"):
        open_labelled([write()], str(tmp_path / "twice.txt"))


@pytest.mark.parametrize(("label", "what"), [(None, "has no label"), ("-1", "'-1' is neither"), ("a\nb", r"'a\\nb'")])
def test_a_sample_without_a_label_is_left_out(
    label: str | None, what: str, write: WriteDigits, names_file: str, caplog: pytest.LogCaptureFixture
):
    labelled = open_labelled([write(lambda i, digit: label if i == 5 else digit)], names_file)
    assert "1 of 40 samples have no valid label and are skipped" in caplog.text
    assert sum(labelled.counts()) == 39
    with pytest.raises(SampleError, match=what) as caught:
        labelled.samples.read(5)
    assert caught.value.cause == "bad-label"


def test_of_very_many_samples_some_are_looked_at(
    write: WriteDigits, names_file: str, digits: Digits, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_LOOK_UPS", 10)
    folder = write(lambda i, digit: 10 if i == 17 else digit)
    labelled = open_labelled([folder], names_file)
    assert sum(labelled.counts()) == 10
    assert labelled.samples.read(18).label == digits[18][0]
    with pytest.raises(SampleError, match="label 10 is not one of the 10 classes"):
        labelled.samples.read(17)
    named = write(lambda i, digit: DIGITS[digit], "named")
    assert open_labelled([named], names_file).samples.read(18).label == digits[18][0]
    with pytest.raises(UsageError, match="labels were read from 10 of 40 samples"):
        open_labelled([named])


def test_labels_that_were_not_read_are_read_before_a_run(
    write: WriteDigits, names_file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(module, "_LOOK_UPS", 4)
    labelled = open_labelled([write(lambda i, digit: None if i == 7 else digit)], names_file)
    assert "no valid label" not in caplog.text
    labelled.samples.check_labels()
    assert "1 of 40 samples have no valid label and are left out, such as" in caplog.text
    assert labelled.samples.labels.count(-1) == 1
    wrong = open_labelled([write(lambda i, digit: 11 if i == 33 else digit, "wrong")], names_file)
    with pytest.raises(DataError, match="the label 11 is out of range") as caught:
        wrong.samples.check_labels()
    assert "d33" in str(caught.value.where)


def test_every_label_of_an_evaluation_has_a_class_name(write: WriteDigits):
    def shards(name: str, change: dict[int, object]) -> IndexedShards:
        folder = write(lambda i, digit: change.get(i, digit), name)
        return IndexedShards(expand_shards(folder), require_caption=False)

    check_class_names(shards("whole", {3: "three"}), DIGITS, "names.txt")
    with pytest.raises(DataError, match="2 of 40 samples of the evaluation have no valid label") as caught:
        check_class_names(shards("without", {17: None, 20: ""}), DIGITS, "names.txt")
    assert "d17" in str(caught.value.where)
    with pytest.raises(UsageError, match="label 10 has no class name: the file has 10") as wrong:
        check_class_names(shards("beyond", {39: 10}), DIGITS, "names.txt")
    assert "d39" in str(wrong.value.where)


def test_classes_without_samples_are_told(write: WriteDigits, caplog: pytest.LogCaptureFixture):
    folder = write(lambda i, digit: digit % 3)
    open_labelled([folder], ",".join(DIGITS))
    assert "7 of 10 classes have no sample: three, four, five, six, seven" in caplog.text
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        open_labelled([folder], known=DIGITS)
    assert not caplog.text


def test_validation_is_numbered_like_training(tmp_path: Path, digits: Digits):
    """Folders number their own classes; a class that the validation data lack must not shift the others."""
    for split, wanted in (("train", {0, 1, 2, 3}), ("val", {1, 3})):
        for i, (digit, png) in enumerate(digits[:60]):
            if digit in wanted:
                folder = tmp_path / split / DIGITS[digit]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i}.png").write_bytes(png)
    train = open_labelled([str(tmp_path / "train")])
    assert train.class_names == ["one", "three", "two", "zero"]
    val = open_labelled([str(tmp_path / "val")], known=train.class_names)
    assert val.class_names == train.class_names
    assert set(all_labels(val)) == {0, 1}
    assert open_labelled([str(tmp_path / "val")], ",".join(DIGITS)).class_names == DIGITS
    (tmp_path / "val" / "four").mkdir()
    (tmp_path / "val" / "four" / "1.png").write_bytes(digits[0][1])
    with pytest.raises(DataError, match="class 'four' is not one of the 4 classes") as caught:
        open_labelled([str(tmp_path / "val")], known=train.class_names)
    assert caught.value.where == str(tmp_path / "val" / "four" / "1.png")


def test_other_data_do_not_go_with_a_folder(write: WriteDigits, tmp_path: Path):
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": "x"}))
    for other in ("tree", "labels.json"):
        with pytest.raises(UsageError, match="cannot be combined with other data"):
            open_labelled([write(name=f"for {other}"), str(tmp_path / other)])
    with pytest.raises(DataError, match="the folder or file does not exist"):
        open_labelled([str(tmp_path / "nothing")])


def test_the_first_difference_of_two_lists_is_named():
    sides = ("the checkpoint", "the data")
    assert class_difference(DIGITS, DIGITS, sides) == ""
    swapped = [*DIGITS[:3], DIGITS[4], DIGITS[3], *DIGITS[5:]]
    assert class_difference(DIGITS, swapped, sides) == "class 3 is 'three' in the checkpoint and 'four' in the data"
    assert class_difference(DIGITS, DIGITS[:9], sides) == "class 9, 'nine', is in the checkpoint and not in the data"
    assert class_difference(DIGITS[:9], DIGITS, sides) == "class 9, 'nine', is in the data and not in the checkpoint"
    check_same_classes(DIGITS, list(DIGITS), sides, "run")
    with pytest.raises(CheckpointError, match="not the same: class 3 is 'three'") as caught:
        check_same_classes(DIGITS, swapped, sides, "run/checkpoints", CheckpointError)
    assert caught.value.where == "run/checkpoints"
    with pytest.raises(UsageError):
        check_same_classes(DIGITS, swapped, sides, "run")
