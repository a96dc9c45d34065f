"""A recipe that is used for other data gives up the class names and the validation data of its own."""

from pathlib import Path

import pytest

from mmvit.config import FinetuneConfig
from mmvit.train.start.config import load_finetune_config

RECIPE = "finetune/digits_vit"
THEIRS = "digits/classes.txt"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("pets/cat", "pets/dog", "made", "bare", "digits"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("made/train-00000.tar", "bare/train-00000.tar", "digits/train-00000.tar", "digits/val-00000.tar"):
        (tmp_path / name).touch()
    (tmp_path / "made" / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / THEIRS).write_text("0\n1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(*overrides: str, source: str = RECIPE) -> FinetuneConfig:
    return load_finetune_config(source, overrides)


def test_classes_are_those_of_the_data(place: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    assert loaded("data.train=pets").classes == ""
    assert "classes: taken from the data, instead of digits/classes.txt" in caplog.text
    assert loaded("data.train=made").classes == "made/classnames.txt"
    assert loaded("data.train=made", source="finetune/swin_t").classes == "made/classnames.txt"
    assert loaded("data.train=bare", source="finetune/swin_t").classes == ""
    assert loaded("data.train=made/train-*.tar").classes == "made/classnames.txt"
    assert loaded("data.train=[made/train-00000.tar]").classes == "made/classnames.txt"


def test_classes_of_the_recipe_stay_for_its_own_data_and_where_the_user_says_so(place: Path):
    assert loaded().classes == THEIRS
    assert loaded("data.train=digits/train-*.tar").classes == THEIRS
    assert loaded("data.train=pets", f"classes={THEIRS}").classes == THEIRS
    assert loaded("data.train=pets", "classes=cat,dog").classes == "cat,dog"
    assert loaded("data.train=bare").classes == THEIRS
    (place / THEIRS).unlink()
    assert loaded("data.train=bare").classes == ""  # shards may have names as labels


def test_a_file_of_the_user_is_taken_as_it_is(place: Path):
    (place / "my.yaml").write_text("data: {train: digits}\nclasses: digits/classes.txt\n")
    assert loaded("data.train=pets", source="my.yaml").classes == THEIRS


def test_validation_data_that_the_recipe_names_and_nobody_has_is_left_out(place: Path):
    assert loaded("data.train=pets").validation.data == ["digits/val-*.tar"]
    (place / "digits" / "val-00000.tar").unlink()
    assert loaded("data.train=pets").validation.data == []
    assert loaded("data.train=pets", "validation.data=held").validation.data == ["held"]
    assert loaded().validation.data == ["digits/val-*.tar"]
