"""The loop refuses to go on with what would spoil a run, and leaves the last good state as it was."""

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmvit.train.loop as loop
from data_tools.errors import CheckpointError, DataError, DivergedError, UsageError
from mmvit.checkpoint import latest_checkpoint
from mmvit.config import PretrainConfig, load_config
from mmvit.data.batches import Batch, TrainBatches
from mmvit.train.log import read_log
from mmvit.train.loop import check, measure_step_time, pretrain
from mmvit.train.step import StepResult

Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tiny_config: Path, tmp_path: Path) -> PretrainConfig:
    """A run of six steps within this process."""
    steps = ["train.steps=6", "train.batch_size=8", "train.save_every=2", "train.log_every=5", "data.num_workers=0"]
    return load_config(PretrainConfig, tiny_config, [f"out={tmp_path / 'run'}", *steps])


def spoil(monkeypatch: pytest.MonkeyPatch, fatal_step: int, loss: float, grad_norm: float) -> None:
    """Have the step of that number, counted from 1, yield these figures."""
    real, count = loop.train_step, 0

    def train_step(*args: object, **kwargs: object) -> StepResult:
        nonlocal count
        count += 1
        result = real(*args, **kwargs)
        return StepResult(torch.tensor(loss), torch.tensor(grad_norm)) if count >= fatal_step else result

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_diverged_run_stops_before_it_saves(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, loss: float, grad_norm: float
):
    spoil(monkeypatch, fatal_step=3, loss=loss, grad_norm=grad_norm)
    with pytest.raises(DivergedError, match="no longer a number") as error:
        pretrain(config)
    assert error.value.exit_code == 6
    assert "step 4" in error.value.where  # the first that would have been saved after it
    assert "train-" in error.value.where  # the samples
    kept = latest_checkpoint(Path(config.out))
    assert kept.step == 2
    assert all(bool(tensor.isfinite().all()) for tensor in kept.tensors["model"].values())
    assert not (Path(config.out) / "model").exists()


def test_program_tells_of_divergence(told: Told, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, fatal_step=1, loss=float("nan"), grad_norm=1.0)
    code, _, err = told("pretrain", tiny_config, f"out={tmp_path / 'run'}", "data.num_workers=0", "train.log_every=1")
    assert code == 6
    assert "mend: lower optim.lr" in err
    assert "Traceback" not in err


def test_changed_data_are_refused(told: Told, finished_run: Path, tiny_config: Path, tiny_data: Path, tmp_path: Path):
    data, run = tmp_path / "data", shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(tiny_data, data)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"{tiny_data}/train", f"{data}/train"))
    assert told("pretrain", config, f"out={run}")[0] == 0  # the same data at another place
    (data / "train-00002.tar").unlink()
    code, _, err = told("pretrain", config, f"out={run}")
    assert code == 4
    assert "the training data changed since the checkpoint" in err
    assert "mend: bring back what was" in err
    assert "Traceback" not in err


def test_checkpoint_of_another_architecture_is_refused(config: PretrainConfig):
    pretrain(config)
    saved = Path(config.out) / "config.yaml"
    config.model.embed_dim = 16
    saved.write_text(saved.read_text().replace("embed_dim: 32", "embed_dim: 16"))
    with pytest.raises(CheckpointError, match="weights do not fit the model"):
        pretrain(config)


def test_damaged_newest_checkpoint_costs_only_its_steps(config: PretrainConfig, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    pretrain(config)
    run = Path(config.out)
    weights = (run / "model" / "model.safetensors").read_bytes()
    newest = run / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    pretrain(config)
    assert str(newest) in caplog.text
    assert "going on at step 4" in caplog.text
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [5, 6]
    assert latest_checkpoint(run).step == 6


def test_free_settings_change_no_weight(config: PretrainConfig, tmp_path: Path):
    weights = []
    for name, log_every, save_every in (("a", 1, 1), ("b", 5, 6)):
        config.out, config.train.log_every, config.train.save_every = str(tmp_path / name), log_every, save_every
        weights.append((pretrain(config) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    config.out, config.seed = str(tmp_path / "c"), 4
    assert (pretrain(config) / "model.safetensors").read_bytes() != weights[0]


def test_run_without_a_checkpoint_may_change_its_settings(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        spoil(patch, fatal_step=1, loss=float("nan"), grad_norm=1.0)
        with pytest.raises(DivergedError):
            pretrain(config)
    config.optim.lr /= 2
    pretrain(config)
    config.optim.lr /= 2
    with pytest.raises(UsageError, match=r"optim\.lr"):
        pretrain(config)


def test_signals_mean_again_what_they_meant(config: PretrainConfig):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    pretrain(config)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_fresh_weights_follow_from_the_seed(config: PretrainConfig):
    first = []
    for config.seed in (3, 3, 4):
        first.append(loop.Run(config).model.image_projection.weight.detach())
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_planning_writes_nothing(config: PretrainConfig):
    assert "300 samples, 6 steps of 8" in check(config)
    assert measure_step_time(config, num_steps=1) > 0
    assert not Path(config.out).exists()


def test_changed_tokenizer_is_refused(config: PretrainConfig, tmp_path: Path):
    tokenizer = Path(shutil.copy(config.tokenizer.path, tmp_path / "tokenizer.json"))
    config.tokenizer.path = str(tokenizer)
    pretrain(config)
    tree = json.loads(tokenizer.read_text())
    vocabulary = tree["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="the tokenizer changed since the checkpoint"):
        pretrain(config)


def test_another_run_does_not_replace_a_finished_model(config: PretrainConfig):
    model = pretrain(config) / "model.safetensors"
    before = model.read_bytes()
    shutil.rmtree(Path(config.out) / "checkpoints")  # a user who makes room
    config.seed += 1
    with pytest.raises(UsageError, match="the folder holds another run"):
        pretrain(config)
    assert model.read_bytes() == before


def test_bad_sample_ends_the_run_with_its_steps_saved(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch):
    config.train.save_every = 100
    bad = TrainBatches.__getitem__

    def damaged_at_step_3(self: TrainBatches, step: int) -> Batch:
        if step == 3:
            raise DataError("image cannot be decoded", where="train-00000.tar/key")
        return bad(self, step)

    monkeypatch.setattr(TrainBatches, "__getitem__", damaged_at_step_3)
    with pytest.raises(DataError, match="image cannot be decoded"):
        pretrain(config)
    assert latest_checkpoint(Path(config.out)).step == 3
