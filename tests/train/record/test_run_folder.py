"""What may change when a run goes on, what is told, what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.core.errors import UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, load_config
from mmvit.data.curriculum import Stage
from mmvit.train.record.run_folder import FREE, REFUSED, TOLD, check_run_folder, is_among, open_run_folder, settings

CLASSES = {"free": FREE, "told": TOLD, "refused": REFUSED}


KEYS = {**settings(PretrainConfig()), **settings(FinetuneConfig())}


@pytest.mark.parametrize("key", KEYS)
def test_each_setting_is_in_one_class(key: str):
    assert len([name for name, names in CLASSES.items() if is_among(key, names)]) == 1, "say what it means to a run"


def test_classes_name_settings_only():
    for names in CLASSES.values():
        assert [name for name in names if not any(is_among(key, [name]) for key in KEYS)] == []


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run of 100 steps that is at step 60."""
    folder = tmp_path / "run"
    open_run_folder(folder, PretrainConfig(out=str(folder)))
    (folder / "checkpoints" / "step-00000060").mkdir(parents=True)
    return folder


def changed(folder: Path, **values: Any) -> PretrainConfig:
    config = load_config(PretrainConfig, folder / "config.yaml")
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
    assert load_config(PretrainConfig, begun / "config.yaml") == config


def test_told_settings_are_told(begun: Path, caplog: pytest.LogCaptureFixture):
    config = changed(begun, train__steps=20_000, train__micro_batches=4, train__log_every=1)
    assert check_run_folder(begun, config).count("\n") == 1
    assert load_config(PretrainConfig, begun / "config.yaml").train.steps == 10_000  # looking writes nothing
    open_run_folder(begun, config)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.splitlines() == [
        "the run goes on with other settings:",
        "    train.steps: 10000 -> 20000",
        "    train.micro_batches: 1 -> 4",
    ]
    assert load_config(PretrainConfig, begun / "config.yaml") == config


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


def test_run_cannot_end_before_where_it_is(begun: Path):
    open_run_folder(begun, changed(begun, train__steps=60))
    with pytest.raises(UsageError, match="the run is at step 60, beyond the 59") as error:
        open_run_folder(begun, changed(begun, train__steps=59))
    assert error.value.hint == "train.steps=60, or more"


def test_setting_that_the_folder_is_older_than_has_its_default(begun: Path):
    path = begun / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "ema_decay" not in line))
    config = load_config(PretrainConfig, path)
    open_run_folder(begun, config)
    config.optim.ema_decay = 0.99
    with pytest.raises(UsageError, match=r"optim\.ema_decay: None -> 0\.99"):
        open_run_folder(begun, config)


@pytest.mark.parametrize("undo", [lambda folder: None, lambda folder: (folder / "checkpoints").mkdir()])
def test_settings_of_a_run_that_saved_nothing_may_change(tmp_path: Path, undo: Callable[[Path], Any]):
    open_run_folder(tmp_path, PretrainConfig())
    undo(tmp_path)
    open_run_folder(tmp_path, PretrainConfig(seed=7))
    assert load_config(PretrainConfig, tmp_path / "config.yaml").seed == 7


def test_what_dead_processes_left_is_removed(begun: Path):
    (begun / ".config.yaml.tmp-1-0123abcd").write_text("half a conf")
    open_run_folder(begun, changed(begun))
    assert sorted(path.name for path in begun.iterdir()) == ["checkpoints", "config.yaml"]
