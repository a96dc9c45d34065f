"""The loop stops before a run is damaged, and keeps the last good checkpoint."""

import errno
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_tools.core.errors import CheckpointError, DataError, DivergedError, UsageError
from mmvit.checkpoint import latest_checkpoint, read_checkpoint
from mmvit.config import PretrainConfig, ZeroShotConfig, load_config
from mmvit.data.batches import Batch, TrainBatches
from mmvit.eval import classify
from mmvit.eval.encoder import Encoder
from mmvit.models.classifier import ImageClassifier
from mmvit.train import loop
from mmvit.train.loop import check, measure_step_time, open_run, pretrain
from mmvit.train.record import saver
from mmvit.train.record.run_log import read_log
from mmvit.train.run import Run, open_accelerator
from mmvit.train.runs import pretraining_loss
from mmvit.train.safety.stop import StopFlag, Stopped
from mmvit.train.safety.watch import Watch

RunCli = Callable[..., tuple[int, str, str]]
SpoiledData = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tiny_config: Path, tmp_path: Path) -> PretrainConfig:
    """A run of six steps within this process."""
    steps = ["train.steps=6", "train.batch_size=8", "train.save_every=2", "train.log_every=5", "data.num_workers=0"]
    return load_config(PretrainConfig, tiny_config, [f"out={tmp_path / 'run'}", *steps])


def opened(config: PretrainConfig) -> Run:
    return open_run(config, open_accelerator(config), Watch(config.train.timeout_s))


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range, how: str) -> None:
    """Have the loss of these steps, counted from 1, be no number, have no gradient, or be far too large."""
    real, count = pretraining_loss.contrastive_loss, 0

    def contrastive_loss(image: Tensor, *rest: Any, **options: Any) -> Tensor:
        nonlocal count
        count += 1
        loss = real(image, *rest, **options)
        if (count + 1) // 2 not in steps:  # two captions an image: two calls a step
            return loss
        zero = image.sum() * 0
        return {"loss": loss * float("nan"), "gradient": loss + zero.abs().sqrt(), "spike": loss * 1e4}[how]

    monkeypatch.setattr(pretraining_loss, "contrastive_loss", contrastive_loss)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_diverged_run_stops_at_the_third_step_in_a_row(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, how: str
):
    spoil(monkeypatch, range(3, 99), how)
    with pytest.raises(DivergedError, match="3 steps in a row were skipped") as error:
        pretrain(config)
    run = Path(config.out)
    assert error.value.exit_code == 6
    assert "step 5" in error.value.where
    assert "train-" in error.value.where  # the samples
    assert "step-00000002" in error.value.note  # refused steps save nothing
    facts = json.loads((run / "diverged.json").read_text())
    assert facts["step"] == 5
    assert len(facts["keys"]) == 8
    kept = latest_checkpoint(run)
    assert all(bool(tensor.isfinite().all()) for group in kept.tensors.values() for tensor in group.values())
    assert not (run / "model").exists()
    before = read_checkpoint(run / "checkpoints" / "step-00000002").tensors["model"]
    assert all(torch.equal(kept.tensors["model"][name], value) for name, value in before.items())


def test_single_bad_steps_are_skipped_logged_and_counted(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    spoil(monkeypatch, range(3, 5), "loss")
    config.train.log_every = 1
    pretrain(config)
    assert "step 3 skipped, weights unchanged: the loss is nan" in caplog.text
    lines = read_log(Path(config.out) / "log.jsonl")
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 2, 2, 2]
    assert lines[2]["loss"] is None
    assert lines[2]["param_norm"] == lines[1]["param_norm"]  # no weight changed


def test_spiking_step_is_skipped(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    spoil(monkeypatch, range(20, 21), "spike")
    config.train.steps = 24
    pretrain(config)
    assert "step 20 skipped, weights unchanged: the loss is" in caplog.text
    assert caplog.text.count("weights unchanged") == 1


def test_program_reports_divergence(
    run_cli: RunCli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, range(1, 99), "loss")
    code, _, err = run_cli(
        "pretrain", tiny_config, f"out={tmp_path / 'run'}", "data.num_workers=0", "train.log_every=1"
    )
    assert code == 6
    assert "hint: decrease optim.lr" in err
    assert "no checkpoint was saved" in err
    assert "Traceback" not in err


def test_changed_data_are_refused(
    run_cli: RunCli, finished_run: Path, tiny_config: Path, tiny_data: Path, tmp_path: Path
):
    data, run = tmp_path / "data", shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(tiny_data, data)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"{tiny_data}/train", f"{data}/train"))
    assert run_cli("pretrain", config, f"out={run}")[0] == 0  # the same data at another place
    (data / "train-00002.tar").unlink()
    code, _, err = run_cli("pretrain", config, f"out={run}")
    assert code == 4
    assert "the training data changed since the checkpoint" in err
    assert "hint: restore the previous state" in err
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
    assert "resuming at step 4" in caplog.text
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
    config.train.save_every = 100
    with monkeypatch.context() as patch:
        spoil(patch, range(1, 99), "loss")
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


def test_stop_request_works_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    """The terminal may be gone."""

    def gone(fd: int, data: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_fresh_weights_follow_from_the_seed(config: PretrainConfig):
    first = []
    for config.seed in (3, 3, 4):
        first.append(opened(config).model.image_projection.weight.detach())
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
    with pytest.raises(UsageError, match="the run has written its model, but its checkpoints are missing"):
        pretrain(config)
    config.seed += 1
    with pytest.raises(UsageError, match="its checkpoints are missing"):
        pretrain(config)
    assert model.read_bytes() == before


def test_a_signal_during_an_evaluation_is_obeyed_at_once(
    config: PretrainConfig, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    config.zero_shot = ZeroShotConfig([f"{tiny_data}/val-*.tar"], f"{tiny_data}/names.en.txt", every=3)
    looked_at = []

    def logits(model: ImageClassifier, pixels: list) -> Tensor:
        looked_at.append(len(pixels))
        signal.raise_signal(signal.SIGTERM)
        return real(model, pixels)

    real = classify._logits
    monkeypatch.setattr(classify, "_logits", logits)
    init = Encoder.__init__
    monkeypatch.setattr(
        Encoder, "__init__", lambda *arguments, **options: init(*arguments, **options | {"batch_size": 8})
    )
    with pytest.raises(Stopped):
        pretrain(config)
    assert looked_at == [8]  # of 40
    assert latest_checkpoint(Path(config.out)).step == 3


@pytest.mark.parametrize(
    ("key", "value"), [("image.num_heads", 4), ("image.norm_eps", 0.1), ("text.activation", "quick_gelu")]
)
def test_weights_of_other_settings_are_refused_though_they_fit(
    config: PretrainConfig, finished_run: Path, key: str, value: object
):
    side, name = key.split(".")
    setattr(getattr(config.model, side), name, value)
    config.train.init = str(finished_run / "model")
    with pytest.raises(UsageError, match=re.escape(f"has different settings: model.{key}=")):
        pretrain(config)


def test_weights_made_with_other_pixels_are_refused(config: PretrainConfig, finished_run: Path):
    config.preprocess.mean = [0.1, 0.2, 0.3]
    config.train.init, config.train.init_only = str(finished_run / "model"), ["image_*"]
    with pytest.raises(UsageError, match=r"preprocess\.mean="):
        pretrain(config)
    config.train.init_only = ["text_*"]
    assert pretrain(config)


def test_weights_that_are_not_finite_are_not_saved(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch):
    take_step = Run.step

    def step(self: Run, number: int, parts: Any) -> Any:
        result = take_step(self, number, parts)
        if number == 3:
            torch.nn.init.constant_(self.model.logit_scale, float("nan"))
        return result

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(DivergedError, match="no longer finite") as error:
        pretrain(config)
    assert "step-00000002" in error.value.note


def test_a_damaged_line_of_the_log_does_not_end_the_run(config: PretrainConfig, caplog: pytest.LogCaptureFixture):
    pretrain(config)
    log = Path(config.out) / "log.jsonl"
    log.write_bytes(log.read_bytes() + b"\0\0\0\n")
    config.train.steps = 8
    pretrain(config)
    assert read_log(log)[-1]["step"] == 8
    assert "1 damaged lines" in caplog.text


def test_invalid_samples_are_logged_and_the_run_continues(
    config: PretrainConfig, spoiled_data: SpoiledData, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Capture
):
    """What is not in the batches stands in the file, with the step that wanted it."""
    data = spoiled_data(tmp_path / "data", broken=range(0, 300, 5))
    config.data.train, config.data.max_bad_fraction = [str(data)], 0.5
    pretrain(config)
    rows = read_log(Path(config.out) / "bad_samples.jsonl")
    batches = opened(config).task.batches
    order = batches.order.epoch(0)[:48].tolist()
    wanted = [(1 + position // 8, batches.source.key(i)) for position, i in enumerate(order) if i % 5 == 0]
    found = [(row["step"], f"{Path(row['shard']).name}/{row['key']}") for row in rows]
    assert set(wanted) <= set(found)
    bad_keys = {batches.source.key(i) for i in range(0, 300, 5)}
    assert {key for _, key in found} <= bad_keys  # others are stand-ins that were bad too
    assert len({key for _, key in found}) == len(found)
    assert {(row["cause"], Path(row["shard"]).parent) for row in rows} == {("bad-image", data)}
    delivered = [batches[step].keys for step in range(6)]
    assert not bad_keys & {key for keys in delivered for key in keys}
    assert {len(keys) for keys in delivered} == {8}

    lines = read_log(Path(config.out) / "log.jsonl")
    assert lines[-1]["bad_samples"] == len(rows)
    assert lines[-1]["bad_causes"] == {"bad-image": len(rows)}
    assert lines[0]["bad_samples"] == sum(row["step"] <= 5 for row in rows)
    assert f"  {len(rows)} invalid samples  " in capfd.readouterr().err
    assert f"{len(rows)} invalid samples were replaced: {len(rows)} bad-image; " in caplog.text


def test_too_many_bad_samples_end_the_run_with_its_steps_saved(
    config: PretrainConfig, spoiled_data: SpoiledData, tmp_path: Path
):
    data = spoiled_data(tmp_path / "data", broken=range(0, 300, 5))
    config.data.train, config.train.save_every = [str(data)], 100
    config.data.max_bad_fraction = 0.5
    undisturbed = pretrain(config)
    rows = read_log(Path(config.out) / "bad_samples.jsonl")
    config.out, config.data.max_bad_fraction = str(tmp_path / "other"), 3 / 300
    with pytest.raises(DataError, match="invalid samples") as caught:
        pretrain(config)
    assert "at most 3 are allowed; the completed steps are saved" in caught.value.note
    saved = latest_checkpoint(Path(config.out)).step
    assert saved == rows[3]["step"] - 1  # the fourth sample came with the step after it
    assert saved > 0
    config.data.max_bad_fraction = 0.5
    model = pretrain(config)
    for name in ("bad_samples.jsonl", "model/model.safetensors"):
        assert (model.parent / name).read_bytes() == (undisturbed.parent / name).read_bytes(), name


def test_what_the_shards_lost_before_the_run_is_in_the_account(
    config: PretrainConfig, spoiled_data: SpoiledData, tmp_path: Path
):
    data = spoiled_data(tmp_path / "data", broken=())
    (data / "train-00002.tar.idx").unlink()
    with (data / "train-00002.tar").open("r+b") as file:
        file.truncate((data / "train-00002.tar").stat().st_size - 12_000)
    config.data.train, config.data.max_bad_fraction = [str(data)], 0.5
    pretrain(config)
    rows = read_log(Path(config.out) / "bad_samples.jsonl")
    assert rows
    assert {row["step"] for row in rows} == {0}
    assert {row["shard"] for row in rows} == {str(data / "train-00002.tar")}
    assert "truncated" in {row["cause"] for row in rows}
    before = (Path(config.out) / "bad_samples.jsonl").read_bytes()
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000006")  # so that it has something to do
    pretrain(config)
    assert (Path(config.out) / "bad_samples.jsonl").read_bytes() == before


def test_data_that_cannot_be_read_end_the_run_with_its_steps_saved(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
):
    config.train.save_every = 100
    load = TrainBatches.load

    def gone_at_step_3(self: TrainBatches, number: int, note: Callable[[int], None]) -> Batch:
        if number == 3:
            raise DataError("the shard does not exist", where="train-00000.tar")
        return load(self, number, note)

    monkeypatch.setattr(TrainBatches, "load", gone_at_step_3)
    with pytest.raises(DataError, match="the shard does not exist"):
        pretrain(config)
    assert latest_checkpoint(Path(config.out)).step == 3


def test_account_is_on_the_disk_before_a_checkpoint_counts_its_steps(
    config: PretrainConfig, spoiled_data: SpoiledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or a power failure would leave steps whose bad samples nobody knows."""
    config.data.train = [str(spoiled_data(tmp_path / "data", broken=range(0, 300, 5)))]
    config.data.max_bad_fraction = 0.5
    account, synced, fsync, save = Path(config.out) / "bad_samples.jsonl", [], os.fsync, saver.save_checkpoint

    def note(fd: int) -> None:
        if account.exists() and os.path.samestat(os.fstat(fd), account.stat()):
            synced.append(account.read_bytes())
        fsync(fd)

    def check(*args: object, **kwargs: object) -> None:
        assert synced[-1] == account.read_bytes()
        save(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(saver, "save_checkpoint", check)
    pretrain(config)
    assert len(synced) == 3


def test_announcement_states_how_far_ahead_is_read(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "rehearse", lambda run, step: [])  # steps of 64 images of 512 px
    assert check(config).splitlines()[0].endswith("; batches are loaded between the steps")
    config.data.num_workers, config.train.batch_size, config.model.image.image_size = 2, 64, 512
    config.data.prefetch_mb = 400
    assert check(config).splitlines()[0].endswith("; workers: 2, preparing 384 MiB of batches ahead")
