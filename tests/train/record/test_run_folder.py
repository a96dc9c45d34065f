"""What may change when a run resumes, what is logged, what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.core.errors import UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, RunConfig, load_config
from mmvit.data.curriculum import Stage
from mmvit.keys import declared
from mmvit.towers.swin import SwinConfig
from mmvit.train.record.run_folder import check_run_folder, open_run_folder, settings
from mmvit.train.record.run_log import read_log

KEYS = {**declared(PretrainConfig()), **declared(FinetuneConfig())}

# What a changed value means to a run that resumes; all other keys must be the same.
FREE = [
    "classes",
    "data.image_embeddings",
    "data.max_bad_fraction",
    "data.num_workers",
    "data.prefetch_mb",
    "data.stall_timeout_s",
    "data.train",
    "loss.layout",
    "loss.teacher",
    "out",
    "tokenizer.path",
    "train.checkpointing",
    "train.compile",
    "train.keep_every",
    "train.keep_last",
    "train.log_every",
    "train.save_every",
    "train.timeout_s",
    "train.trackers",
    "validation.data",
    "validation.every",
    "validation.limit",
    "validation.samples",
    "zero_shot.class_names",
    "zero_shot.data",
    "zero_shot.every",
    "zero_shot.limit",
    "zero_shot.templates",
]
LOGGED = [
    "data.verify",
    "optim.clip_norm",
    "train.init",
    "train.init_only",
    "train.micro_batches",
    "train.spike_factor",
    "train.steps",
]


def test_keys_that_may_change_are_these():
    assert sorted(name for name, key in KEYS.items() if key.resume == "free") == FREE
    assert sorted(name for name, key in KEYS.items() if key.resume == "logged") == LOGGED


@pytest.mark.parametrize("config", [PretrainConfig(), FinetuneConfig()], ids=["pretrain", "finetune"])
def test_each_setting_is_a_declared_key(config: RunConfig):
    assert list(declared(config)) == list(settings(config))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run of 100 steps that is at step 60."""
    folder = tmp_path / "run"
    open_run_folder(folder, PretrainConfig(out=str(folder)))
    (folder / "checkpoints" / "step-00000060").mkdir(parents=True)
    return folder


def changed(folder: Path, **values: Any) -> PretrainConfig:
    config = load_config(PretrainConfig, folder / "config.yaml", complete=False)
    for key, value in values.items():
        *path, name = key.split("__")
        part: Any = config
        for each in path:
            part = getattr(part, each)
        setattr(part, name, value)
    return config


def test_free_settings_change_silently(begun: Path, caplog: pytest.LogCaptureFixture):
    config = changed(begun, out="elsewhere", train__keep_every=50, train__compile=True, zero_shot__every=7)
    caplog.set_level(logging.INFO)
    open_run_folder(begun, config)
    assert caplog.text == ""
    assert load_config(PretrainConfig, begun / "config.yaml", complete=False) == config


def test_changed_settings_are_logged(begun: Path, caplog: pytest.LogCaptureFixture):
    config = changed(begun, train__steps=20_000, train__micro_batches=4, train__log_every=1)
    assert check_run_folder(begun, config) == {"train.steps": (10_000, 20_000), "train.micro_batches": (1, 4)}
    assert (
        load_config(PretrainConfig, begun / "config.yaml", complete=False).train.steps == 10_000
    )  # looking writes nothing
    open_run_folder(begun, config, step=60)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.splitlines() == [
        "the run resumes with changed settings:",
        "    train.steps: 10000 -> 20000",
        "    train.micro_batches: 1 -> 4",
        "    learning rate: 5.99e-05 (warm-up) at step 60 -> 3.05e-05 (warm-up) at step 61",
        "  note: the schedule is now that of a run of 20000 steps from its start",
    ]
    assert read_log(begun / "log.jsonl")[-1] == {
        **{"step": 60, "time_s": 0.0},
        "changed": {"train.steps": [10_000, 20_000], "train.micro_batches": [1, 4]},
    }
    assert load_config(PretrainConfig, begun / "config.yaml", complete=False) == config


def test_refused_settings_are_shown_and_change_nothing(begun: Path):
    before = (begun / "config.yaml").read_bytes()
    config = changed(begun, optim__betas=[0.9, 0.95], model__embed_dim=64, curriculum=[Stage()], train__steps=7)
    with pytest.raises(UsageError) as error:
        open_run_folder(begun, config)
    assert error.value.exit_code == 2
    lines = error.value.what.splitlines()
    assert lines[1].startswith("    curriculum: [] -> [{'until': 1.0")
    # The one that may change is left out.
    assert lines[2:] == ["    optim.betas: [0.9, 0.98] -> [0.9, 0.95]", "    model.embed_dim: 512 -> 64"]
    assert "out=FOLDER" in error.value.hint
    assert (begun / "config.yaml").read_bytes() == before


def test_image_tower_of_another_kind_is_refused(begun: Path):
    with pytest.raises(UsageError, match=r"(?s)model\.image\.kind: vit -> swin.*model\.image\.window_size: None -> 7"):
        open_run_folder(begun, changed(begun, model__image=SwinConfig()))


def test_run_cannot_end_before_where_it_is(begun: Path):
    open_run_folder(begun, changed(begun, train__steps=60))
    with pytest.raises(UsageError, match=r"the run is at step 60, beyond train\.steps=59") as error:
        open_run_folder(begun, changed(begun, train__steps=59))
    assert error.value.hint == "use train.steps=60 or more"


def test_setting_that_the_folder_is_older_than_has_its_default(begun: Path):
    path = begun / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "ema_decay" not in line))
    config = load_config(PretrainConfig, path, complete=False)
    open_run_folder(begun, config)
    config.optim.ema_decay = 0.99
    with pytest.raises(UsageError, match=r"optim\.ema_decay: None -> 0\.99"):
        open_run_folder(begun, config)


@pytest.mark.parametrize("undo", [lambda folder: None, lambda folder: (folder / "checkpoints").mkdir()])
def test_settings_of_a_run_that_saved_nothing_may_change(tmp_path: Path, undo: Callable[[Path], Any]):
    open_run_folder(tmp_path, PretrainConfig())
    undo(tmp_path)
    open_run_folder(tmp_path, PretrainConfig(seed=7))
    assert load_config(PretrainConfig, tmp_path / "config.yaml", complete=False).seed == 7


def test_what_dead_processes_left_is_removed(begun: Path):
    (begun / ".config.yaml.tmp-1-0123abcd").write_text("half a conf")
    open_run_folder(begun, changed(begun))
    assert sorted(path.name for path in begun.iterdir()) == ["checkpoints", "config.yaml"]


def test_saved_config_means_the_same_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = PretrainConfig(out="run")
    config.data.train, config.train.init = ["shards/{0..3}.tar", "s3://bucket/a.tar", "pipe:cat a.tar", "/a"], "model"
    config.loss.teacher, config.zero_shot.data = "timm:resnet18", ["val"]
    open_run_folder(tmp_path / "run", config)
    (tmp_path / "run" / "checkpoints" / "step-00000060").mkdir(parents=True)
    saved = load_config(PretrainConfig, tmp_path / "run" / "config.yaml", complete=False)
    assert saved.data.train == [f"{tmp_path}/shards/{{0..3}}.tar", "s3://bucket/a.tar", "pipe:cat a.tar", "/a"]
    assert (saved.train.init, saved.zero_shot.data) == (f"{tmp_path}/model", [f"{tmp_path}/val"])
    assert (saved.loss.teacher, saved.zero_shot.templates, saved.out) == ("timm:resnet18", "simple", "run")
    assert check_run_folder(tmp_path / "run", config) == {}  # the same model, named otherwise
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert check_run_folder(tmp_path / "run", saved) == {}
    assert check_run_folder(tmp_path / "run", config)["train.init"] == (f"{tmp_path}/model", "model")
