"""Values that YAML would change, folders that a config means: text stays text, ~ is home, a run is where it lies."""

import logging
from pathlib import Path

import pytest

from mmvit.config import FinetuneConfig, PretrainConfig, load_config, to_yaml
from mmvit.keys import declared
from mmvit.train.record.run_folder import settings
from mmvit.train.start.config import load_finetune_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config with all that a run needs."""
    (tmp_path / "file.yaml").write_text("data: {train: [x]}\n")
    return tmp_path / "file.yaml"


@pytest.mark.parametrize("text", ["0123", "1_000", "2024-01-01", "true", "no", "null", "1e3", "0x10", "1:30", "007.50"])
def test_text_keys_keep_the_text_that_is_written(file: Path, tmp_path: Path, text: str):
    overrides = [f"out={text}", f"train.init={text}", f"data.train=[{text}, x]", f"train.freeze={text}"]
    language = "no" if text == "null" else text  # a key of YAML that is null is refused
    overrides.append(f"data.captions=[{{source: names, weights: {{{language}: 1}}}}]")
    config = load_config(PretrainConfig, file, overrides)
    assert (config.out, config.train.init, config.data.train) == (text, text, [text, "x"])
    assert config.train.freeze == [text]
    assert config.data.captions[0].weights == {language: 1}
    (tmp_path / "run.yaml").write_text(f"out: {text}\ndata: {{train: ['{text}'], image_embeddings: {text}}}\n")
    config = load_config(PretrainConfig, tmp_path / "run.yaml")
    assert (config.out, config.data.train, config.data.image_embeddings) == (text, [text], text)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(PretrainConfig, tmp_path / "again.yaml") == config


def test_null_and_numbers_remain_what_they_are_elsewhere(file: Path):
    overrides = ["tokenizer.start=null", "train.steps=1_000", "optim.lr=1e-3", "train.compile=yes", "seed=0x10"]
    config = load_config(PretrainConfig, file, [*overrides, "out=${seed}"])
    assert (config.tokenizer.start, config.train.steps, config.optim.lr) == (None, 1000, 1e-3)
    assert (config.train.compile, config.seed, config.out) == (True, 16, "0x10")


def test_home_folder_is_expanded_in_each_path_key_and_only_at_the_start(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/h")
    paths = ("out", "train.init", "loss.teacher", "tokenizer.path", "data.image_embeddings", "zero_shot.class_names")
    for kind in (PretrainConfig, FinetuneConfig):
        keys = {name: found for name, found in declared(kind()).items() if found.path}
        config = load_config(kind, file, [f"{name}=~/a/~b" for name in keys], complete=False)
        values = [value for name, value in settings(config).items() if name in keys]
        assert [value[0] if isinstance(value, list) else value for value in values] == ["/h/a/~b"] * len(keys)
        assert {*paths} <= {*keys} or kind is FinetuneConfig
    assert load_config(PretrainConfig, file, ["data.train=[a~,s3://b/~c,~/d]"]).data.train == [
        *("a~", "s3://b/~c", "/h/d"),
    ]


@pytest.mark.parametrize("left", ["log.jsonl", "checkpoints", "model"])
def test_config_in_the_folder_of_a_run_means_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: str
):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "renamed"
    folder.mkdir()
    (folder / "config.yaml").write_text("out: runs/a\ndata: {train: [x]}\n")
    assert load_config(PretrainConfig, "renamed/config.yaml").out == "runs/a"  # a config like any other
    (folder / left).mkdir()
    assert load_config(PretrainConfig, "renamed/config.yaml").out == str(folder)
    assert f"out={folder}, where it says runs/a" in caplog.text
    assert load_finetune_config("renamed/config.yaml").out == str(folder)
    assert load_config(PretrainConfig, folder / "config.yaml", ["out=b"]).out == "b"
    caplog.clear()
    monkeypatch.chdir(folder)
    (folder / "config.yaml").write_text("out: ../renamed\ndata: {train: [x]}\n")
    assert load_config(PretrainConfig, "config.yaml").out == str(folder)
    assert not caplog.text
