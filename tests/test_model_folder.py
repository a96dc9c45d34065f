"""A model is named by its folder or by that of its run; what is neither is a mistyped path with a hint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import mmvit
from data_tools.core.errors import CheckpointError, UsageError
from mmvit.checkpoint import load_model, model_fingerprint, model_settings
from mmvit.model_folder import CLASSIFIER, DUAL_ENCODER, find_model
from mmvit.train.runs.teacher import load_teacher

STORED = Path(__file__).parent / "fixtures" / "checkpoints" / "version2"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(STORED / "model", tmp_path / "runs" / "x" / "model")
    shutil.copytree(STORED / "run", tmp_path / "runs" / "x", dirs_exist_ok=True)
    shutil.copytree(STORED / "run", tmp_path / "runs" / "half")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hint(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        find_model(name)
    assert isinstance(caught.value, CheckpointError)  # as loading a model raises
    assert caught.value.exit_code == 2
    return str(caught.value.hint)


def test_folder_of_a_run_is_its_model(place: Path):
    assert find_model("runs/x") == find_model("runs/x/model") == Path("runs/x/model")
    assert model_fingerprint("runs/x") == model_fingerprint("runs/x/model")
    assert model_settings("runs/x")["kind"] == DUAL_ENCODER
    assert load_model("runs/x").fingerprint == load_model(STORED / "model").fingerprint
    assert mmvit.load("runs/x").image_size == mmvit.load(STORED / "model").image_size


def test_folder_of_a_run_is_a_teacher(place: Path):
    loaded, device = load_model("runs/x"), torch.device("cpu")
    assert load_teacher("runs/x", loaded.tokenizer, 24, device).fingerprint == loaded.fingerprint
    with pytest.raises(UsageError, match="not a model folder") as caught:
        load_teacher("runs/z", loaded.tokenizer, 24, device)
    assert caught.value.hint == "runs contains runs/half, runs/x"


def test_model_that_a_killed_run_was_replacing(place: Path):
    Path("runs/x/model").rename("runs/x/.model.new")
    assert find_model("runs/x") == find_model("runs/x/model") == Path("runs/x/.model.new")


def test_run_without_a_model_says_how_to_finish_it(place: Path):
    assert hint("runs/half").startswith("let it run to its end: mmvit pretrain runs/half/config.yaml")
    assert hint("runs/half/model").startswith("let it run to its end: mmvit pretrain runs/half/config.yaml")
    assert hint("runs/half/checkpoints/step-00000004").startswith("let it run to its end: mmvit pretrain")
    assert hint("runs/x/checkpoints") == "the model of the run: runs/x/model"
    text = Path("runs/half/config.yaml").read_text().replace("\ntokenizer:", "\nclasses:")
    Path("runs/half/config.yaml").write_text(text)
    assert "mmvit finetune runs/half/config.yaml" in hint("runs/half")


def test_path_that_does_not_exist_gets_near_names(place: Path):
    assert hint("runs/x/modle") == "did you mean runs/x/model?"
    assert hint("runs/hlaf") == "did you mean runs/half?"
    assert hint("run/x") == "did you mean runs/x?"
    assert hint("runs/y") == "runs contains runs/half, runs/x"
    assert hint("runs") == "did you mean runs/x?"
    assert "mmvit import open_clip:ViT-B-32/TAG OUT" in hint("ViT-B-32")
    assert "mmvit import hf:openai/clip-vit-base-patch32 OUT" in hint("openai/clip-vit-base-patch32")
    assert "mmvit import timm:vit_tiny OUT" in hint("timm:vit_tiny")


def test_kind_is_looked_at_before_anything_is_loaded(place: Path):
    assert find_model("runs/x", DUAL_ENCODER)
    with pytest.raises(UsageError, match="a dual encoder, but a classifier is needed") as caught:
        find_model("runs/x", CLASSIFIER)
    assert caught.value.hint == "use it with mmvit zero-shot"
    description = Path("runs/x/model/mmvit.json")
    for text in ("{", "[]", json.dumps({"kind": ["x"]})):
        description.write_text(text)
        assert find_model("runs/x", CLASSIFIER)  # loading reports the damage
