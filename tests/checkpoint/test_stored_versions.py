"""Folders of every earlier format version still work. They are kept forever and never rewritten.

version1: a run of six steps, stopped after four, the data that it resumes with, the model of its end, and the outputs
of that model for an image and two texts on that day.
version2: the same with EMA weights, checkpoints with a hash of their manifest, an index next to the shard, and an
embedding folder of that shard with the results of a search.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmvit
from data_tools.tar.index import ShardIndex, open_index
from mmvit.checkpoint import latest_checkpoint
from mmvit.train.record.run_log import read_log

STORED = Path(__file__).parents[1] / "fixtures" / "checkpoints"
VERSIONS = sorted(path.name for path in STORED.iterdir())

RunCli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("version", VERSIONS)
def test_stored_model_gives_the_stored_outputs(version: str):
    encoder = mmvit.load(STORED / version / "model")
    expected = json.loads((STORED / version / "outputs.json").read_text())
    image = encoder.encode_image([STORED / version / "picture.jpg"])
    torch.testing.assert_close(image, torch.tensor(expected["image"]), atol=1e-6, rtol=0)
    text = encoder.encode_text(expected["texts"])
    torch.testing.assert_close(text, torch.tensor(expected["text"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_stored_run_resumes(version: str, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shutil.copytree(STORED / version, tmp_path / version))
    assert latest_checkpoint(Path("run")).step == 4
    code, _, err = run_cli("pretrain", "run/config.yaml")
    assert code == 0, err
    assert "step 5/6" in err
    assert "step 4/6" not in err
    assert [line["step"] for line in read_log(Path("run/log.jsonl"))] == [1, 2, 3, 4, 5, 6]
    expected = json.loads(Path("outputs.json").read_text())
    assert read_log(Path("run/log.jsonl"))[-1]["loss"] == pytest.approx(expected["final_loss"]["loss"], abs=1e-3)
    image = mmvit.load("run/model").encode_image(["picture.jpg"])
    torch.testing.assert_close(image, torch.tensor(expected["image"]), atol=1e-3, rtol=0)


def test_stored_embeddings_give_the_stored_results(tmp_path: Path, run_cli: RunCli):
    folder = shutil.copytree(STORED / "version2", tmp_path / "version2")
    code, out, err = run_cli("search", folder / "embeddings", "--text", "a red fruit", "-k", 3, "--json")
    assert code == 0, err
    expected = json.loads((folder / "outputs.json").read_text())["hits"]
    hits = json.loads(out)
    assert [hit["image_path"] for hit in hits] == [hit["image_path"] for hit in expected]
    assert [hit["caption"] for hit in hits] == [hit["caption"] for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in expected], abs=1e-4)


def test_stored_index_is_read_as_it_is(tmp_path: Path):
    folder = shutil.copytree(STORED / "version2" / "data", tmp_path / "data")
    before = (folder / "shard-00000.tar.idx").read_bytes()
    modified = ShardIndex(folder / "shard-00000.tar", before).header["tar_mtime_ns"]
    os.utime(folder / "shard-00000.tar", ns=(modified, modified))  # a checkout gives files new times
    assert len(open_index(folder / "shard-00000.tar")) == 12
    assert (folder / "shard-00000.tar.idx").read_bytes() == before


def test_first_version_has_no_seal():
    """Otherwise these tests would not prove that such folders are read."""
    assert VERSIONS[0] == "version1"
    for name in ("run/checkpoints/step-00000004/manifest.json", "model/mmvit.json"):
        assert "sha256" not in json.loads((STORED / "version1" / name).read_text())
