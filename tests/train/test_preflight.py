"""What a run needs at its end is checked before its first step."""

import importlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools.core.errors import DataError, MmvitError, UsageError
from data_tools.tar.expand import expand_shards
from data_tools.tar.writer import ShardWriter
from mmvit.config import PretrainConfig, TrainConfig, ZeroShotConfig, load_config
from mmvit.data.shards import IndexedShards
from mmvit.train import preflight
from mmvit.train.loop import check, open_run, pretrain
from mmvit.train.run import Run, open_accelerator
from mmvit.train.safety.watch import Watch


@pytest.fixture
def config(tiny_config: Path, tmp_path: Path) -> PretrainConfig:
    settings = ["train.steps=2", "train.batch_size=8", "train.save_every=1", "data.num_workers=0"]
    return load_config(PretrainConfig, tiny_config, [f"out={tmp_path / 'run'}", *settings])


def opened(config: PretrainConfig) -> Run:
    return open_run(config, open_accelerator(config), Watch(config.train.timeout_s))


@pytest.mark.parametrize(
    ("steps", "save_every", "keep_last", "keep_every", "number"),
    [
        (100, 10, 2, None, 3),  # while the third is written
        (100, 60, 5, None, 2),
        (1, 500, 2, None, 1),
        (100, 10, 2, 10, 11),
        (100, 10, 1, 50, 3),  # 50, and two at the end
        (100, 30, 1, 20, 3),  # 60, and two at the end
    ],
)
def test_number_of_checkpoints_on_the_disk(
    steps: int, save_every: int, keep_last: int, keep_every: int | None, number: int
):
    train = TrainConfig(steps=steps, save_every=save_every, keep_last=keep_last, keep_every=keep_every)
    assert preflight.num_checkpoints(train) == number


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_size_of_a_checkpoint_is_known_before_it_is_written(config: PretrainConfig, optimizer: str):
    config.optim.name, config.optim.ema_decay = optimizer, 0.9
    expected, model = preflight.checkpoint_bytes(opened(config))
    folder = pretrain(config)
    (newest, *_) = sorted((Path(config.out) / "checkpoints").iterdir(), reverse=True)
    size = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    assert expected == pytest.approx(size, rel=0.03)  # names and steps are not counted
    assert model == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.03)


def test_disk_without_room_is_refused_and_little_room_is_reported(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = opened(config)
    one, model = preflight.checkpoint_bytes(run)
    usage = shutil.disk_usage("/")
    for free, reported in ((2 * one + model - 1, None), (2 * one + model, True), (4 * one, False)):
        caplog.clear()
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if reported is None:
            with pytest.raises(UsageError, match=r"the run writes .* and the disk has .* free: up to 2 checkpoints"):
                preflight.preflight(run)
        else:
            preflight.preflight(run)
            assert ("the run writes" in caplog.text) is reported


def test_all_that_would_fail_is_said_at_once(
    config: PretrainConfig, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a dry run too, which writes nothing."""
    config.out = str(tmp_path / "run")
    config.train.trackers = ["tensorboard"]
    config.zero_shot = ZeroShotConfig([str(unlabelled(tiny_data, tmp_path / "val"))], f"{tiny_data}/names.en.txt")
    real = importlib.import_module

    def import_module(name: str, *rest: Any) -> Any:
        if "tensorboard" in name:
            raise RuntimeError("half installed")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="not empty and not a run folder"):
        check(config)
    config.out = str(tmp_path / "run" / "below")
    with pytest.raises(UsageError) as caught:
        check(config)
    for text in ("fail for 3 reasons", "run is not a folder", "'tensorboard' cannot be imported: half installed"):
        assert text in str(caught.value)
    assert "1 of 12 samples of the evaluation have no valid label" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "val"]


def test_evaluation_that_would_fail_at_the_end_is_found_before_the_first_step(
    config: PretrainConfig, tmp_path: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture
):
    config.zero_shot = ZeroShotConfig([str(unlabelled(tiny_data, tmp_path / "val"))], f"{tiny_data}/names.en.txt")
    with pytest.raises(DataError, match="no valid label"):
        pretrain(config)
    assert not (tmp_path / "run").exists()
    config.zero_shot.data = [str(broken(tiny_data, tmp_path / "broken"))]
    with pytest.raises(MmvitError, match="cannot be classified"), caplog.at_level(logging.ERROR):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def unlabelled(tiny_data: Path, folder: Path) -> Path:
    """Write twelve labelled images, of which the eighth has no label."""
    return _written(tiny_data, folder, lambda i, fields: fields.pop("cls") if i == 7 else None)


def broken(tiny_data: Path, folder: Path) -> Path:
    return _written(tiny_data, folder, lambda i, fields: fields.update(png=fields["png"][:40]))


def _written(tiny_data: Path, folder: Path, change: Any) -> Path:
    shards = IndexedShards(expand_shards(f"{tiny_data}/val-*.tar"), require_caption=False)
    with ShardWriter(folder) as writer:
        for i in range(12):
            fields = shards.fields(i)
            change(i, fields)
            writer.copy(f"key{i}", fields)
    return folder


def test_periodic_faults_do_not_hit_all_samples_that_are_tried(
    config: PretrainConfig, spoiled_data: Any, tmp_path: Path
):
    """Every sixth of 300 is bad, and 50 are tried."""
    config.data.train = [str(spoiled_data(tmp_path / "data", broken=range(0, 300, 6)))]
    config.data.max_bad_fraction = 0.5
    preflight.check_training(opened(config))
    config.data.train = [str(spoiled_data(tmp_path / "worse", broken=range(300)))]
    with pytest.raises(DataError, match="none of 50 samples can be used"):
        preflight.check_training(opened(config))
