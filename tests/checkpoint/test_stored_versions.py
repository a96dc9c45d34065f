"""Folders of every earlier format version still work. They are kept forever and never rewritten.

version1: a run of six steps, stopped after four, the data to resume with, its final model, and the outputs of that
model for an image and two texts at that time.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmvit
from mmvit.checkpoint import latest_checkpoint
from mmvit.train.record.run_log import read_log

STORED = Path(__file__).parents[1] / "fixtures" / "checkpoints"
VERSIONS = sorted(path.name for path in STORED.iterdir())

Told = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("version", VERSIONS)
def test_stored_model_gives_the_stored_outputs(version: str):
    encoder = mmvit.load(STORED / version / "model")
    expected = json.loads((STORED / version / "outputs.json").read_text())
    image = encoder.encode_image([STORED / version / "picture.jpg"])
    torch.testing.assert_close(image, torch.tensor(expected["image"]), atol=1e-6, rtol=0)
    text = encoder.encode_text(expected["texts"])
    torch.testing.assert_close(text, torch.tensor(expected["text"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_stored_run_resumes(version: str, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shutil.copytree(STORED / version, tmp_path / version))
    assert latest_checkpoint(Path("run")).step == 4
    code, _, err = told("pretrain", "run/config.yaml")
    assert code == 0, err
    assert "step 5/6" in err
    assert "step 4/6" not in err
    assert [line["step"] for line in read_log(Path("run/log.jsonl"))] == [1, 2, 3, 4, 5, 6]
    expected = json.loads(Path("outputs.json").read_text())
    assert read_log(Path("run/log.jsonl"))[-1]["loss"] == pytest.approx(expected["final_loss"]["loss"], abs=1e-3)
    image = mmvit.load("run/model").encode_image(["picture.jpg"])
    torch.testing.assert_close(image, torch.tensor(expected["image"]), atol=1e-3, rtol=0)


def test_first_version_has_no_seal():
    """Otherwise these tests would not prove that such folders are read."""
    assert VERSIONS[0] == "version1"
    for name in ("run/checkpoints/step-00000004/manifest.json", "model/mmvit.json"):
        assert "sha256" not in json.loads((STORED / "version1" / name).read_text())
