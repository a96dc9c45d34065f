"""A run's configuration: what is read is what was written, and what does not fit is named."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.core.errors import UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, RunConfig, find_config, from_tree, load_config, to_yaml
from mmvit.data.captions import CaptionConfig
from mmvit.data.prompts import configs_folder
from mmvit.models.image_towers import tower_config

CONFIGS = sorted(path for path in configs_folder().rglob("*.yaml") if "prompts" not in path.parts)


def kind_of(path: Path | None) -> type[RunConfig]:
    return FinetuneConfig if path and path.parent.name == "finetune" else PretrainConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\ntrain: {steps: 7}\ndata: {train: shards}\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_runs(path: Path):
    config = load_config(kind_of(path), path)
    config.data.train = config.data.train or ["shards"]  # filled in by the program where the file leaves it open
    if isinstance(config, FinetuneConfig) and config.loss.kind == "labels":
        config.train.init = config.train.init or "model"  # which the command names
    config.check()
    head = path.read_text().split("\nseed")[0]
    assert "# Command:" in head
    assert find_config(str(path.relative_to(configs_folder()).with_suffix(""))) == path


def test_there_is_a_shipped_config():
    assert "quickstart" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", [None, *CONFIGS], ids=lambda path: path.stem if path else "default")
def test_yaml_round_trip_is_the_identity(path: Path | None, tmp_path: Path):
    config = PretrainConfig() if path is None else load_config(kind_of(path), path)
    config.data.train = ["a b/{000..012}.tar", "*.tar", "\uac1c: x"]
    config.data.captions = [CaptionConfig("names.ko", ["{} \uc774\ubaa8\uc9c0", "{}", "# {}"]), CaptionConfig()]
    config.optim.clip_norm = None
    config.data.augment.zoom = [0.5, 1.0]
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(kind_of(path), tmp_path / "run.yaml") == config


def test_values_of_the_file_and_of_the_command_line(file: Path):
    config = load_config(PretrainConfig, file, ["train.steps=9", "optim.clip_norm=null", "optim.lr=1e-3", "out=a=b"])
    assert (config.seed, config.train.steps, config.optim.clip_norm, config.optim.lr) == (5, 9, None, 1e-3)
    assert config.out == "a=b"
    assert config.data.train == ["shards"]  # a single value for a list
    assert load_config(PretrainConfig, file, ["data.train=[a,b]"]).data.train == ["a", "b"]
    with pytest.raises(UsageError, match=r"data\.train is given 2 times"):  # what a shell makes of an unquoted {0..1}
        load_config(PretrainConfig, file, ["data.train=a-0.tar", "data.train=a-1.tar"])
    captions = load_config(PretrainConfig, file, ["data.captions={source: names.ko}"]).data.captions
    assert captions == [CaptionConfig("names.ko")]
    assert load_config(PretrainConfig, file, ["zero_shot.limit=3"]).zero_shot.limit == 3
    nothing = load_config(PretrainConfig, file, ["train.init=", "train.freeze=", "out="])
    assert (nothing.train.init, nothing.train.freeze, nothing.out) == ("", [], "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=null", "train.steps"),
        ("train.steps=[1]", "train.steps"),
        ("optim.betas=[a,b]", "optim.betas"),
        ("train=5", "train"),
        ("train.same_caption_positives=maybe", "train.same_caption_positives"),
        ("train.steps", "not key=value"),
        ("=5", "not key=value"),
        ("data.train=[a", "cannot be read"),
        ("train.step=5", "did you mean 'steps'?"),
        ("trian.steps=5", "did you mean 'train'?"),
        ("data.captions=[{sources: txt}]", "data.captions[0].sources"),
        ("model.image.patch=5", "model.image.patch"),
        ("out=${nothing}", "out"),
    ],
)
def test_override_that_does_not_fit_is_named(file: Path, override: str, message: str):
    with pytest.raises(UsageError) as error:
        load_config(PretrainConfig, file, [override])
    assert message in str(error.value)
    assert "\n\n" not in str(error.value)  # one line of the library's message, not its whole page


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "seed: {a: 1}", "just words", "train: [1]", "\x00"])
def test_file_that_is_no_config_is_refused(tmp_path: Path, text: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        load_config(PretrainConfig, tmp_path / "bad.yaml")


def test_tag_that_runs_code_is_refused(tmp_path: Path):
    canary = tmp_path / "canary"
    (tmp_path / "bad.yaml").write_text(f'out: !!python/object/apply:os.system ["touch {canary}"]\n')
    with pytest.raises(UsageError):
        load_config(PretrainConfig, tmp_path / "bad.yaml")
    assert not canary.exists()


def test_missing_config_suggests_one(tmp_path: Path):
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        load_config(PretrainConfig, "quikstart")
    with pytest.raises(UsageError, match="quickstart"):
        load_config(PretrainConfig, tmp_path / "none")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.name", "adam"),
        ("optim.decay", "step"),
        ("train.precision", "fp16"),
        ("train.steps", 0),
        ("train.batch_size", -1),
        ("train.log_every", 0),
        ("train.save_every", 0),
        ("data.train", []),
    ],
)
def test_values_that_no_run_can_have(key: str, value: Any):
    config = PretrainConfig()
    config.data.train = ["shards"]
    config.check()
    *path, name = key.split(".")
    node: Any = config
    for part in path:
        node = getattr(node, part)
    setattr(node, name, value)
    with pytest.raises(UsageError, match=key):
        config.check()


def test_written_config_names_every_field():
    tree = yaml.safe_load(to_yaml(PretrainConfig()))
    assert from_tree(PretrainConfig, tree, "there") == PretrainConfig()
    assert set(tree["train"]) == {entry.name for entry in dataclasses.fields(PretrainConfig().train)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=.nan", "optim.lr is nan"),
        ("optim.muon_lr=-1", "optim.muon_lr is -1"),
        ("optim.eps=-1", "optim.eps is -1"),
        ("curriculum=[{until: 1, text_tokens: 400}]", "longest curriculum text_tokens is 400; it must be from 0 to 77"),
        ("zero_shot.every=0", "zero_shot.every is 0; it must be at least 1"),
        ("seed=-1", "seed is -1"),
        ("optim.warmup_share=2000", "optim.warmup_share is 2000.0; it must be from 0 to 1"),
        ("optim.betas=[0.9]", "number of optim.betas is 1"),
        ("data.captions=[]", "number of data.captions is 0"),
        ("data.num_workers=-1", "data.num_workers is -1"),
        ("data.captions={templates: simple}", "the template 'simple' has 0 placeholders"),
        ("zero_shot.data=x", "zero_shot.data has no class names"),
    ],
)
def test_values_no_run_can_have(file: Path, override: str, message: str):
    load_config(PretrainConfig, file).check()
    with pytest.raises(UsageError, match=re.escape(message)):
        load_config(PretrainConfig, file, [override]).check()


@pytest.mark.parametrize("kind", ["swin_t", "cvt_13", "rn50", "vit_ti16", "timm:resnet18"])
def test_image_towers_of_every_kind_survive_a_round_trip(tmp_path: Path, kind: str):
    (tmp_path / "run.yaml").write_text(f"model: {{image: {{kind: '{kind}', image_size: 448}}}}\n")
    config = load_config(PretrainConfig, tmp_path / "run.yaml")
    assert config.model.image == dataclasses.replace(tower_config(kind), image_size=448)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(PretrainConfig, tmp_path / "again.yaml") == config


def test_keys_of_another_kind_are_refused(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("model: {image: {kind: swin_t, depth: 3}}\n")
    with pytest.raises(UsageError, match=r"unknown config key model\.image\.depth") as error:
        load_config(PretrainConfig, tmp_path / "run.yaml")
    assert error.value.hint == "did you mean 'depths'?"
