"""A run as a user starts it: what it leaves behind, what it says, and when it refuses."""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmvit
from data_tools.core.errors import UsageError
from data_tools.core.ownership import owned
from mmvit.config import PretrainConfig, load_config
from mmvit.data.batches import Batch
from mmvit.data.shards import IndexedShards
from mmvit.train.contract import StepResult
from mmvit.train.loop import pretrain
from mmvit.train.record.run_log import OF_THE_MACHINE, read_log
from mmvit.train.run import Run

RunCli = Callable[..., tuple[int, str, str]]


def test_run_folder_holds_what_is_promised(finished_run: Path, tiny_config: Path, tiny_data: Path, tmp_path: Path):
    assert sorted(path.name for path in finished_run.iterdir()) == ["checkpoints", "config.yaml", "log.jsonl", "model"]
    assert [path.name for path in sorted((finished_run / "checkpoints").iterdir())] == [
        "step-00000016",
        "step-00000020",
    ]
    files = sorted(path.name for path in (finished_run / "checkpoints" / "step-00000020").iterdir())
    assert files == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    saved, given = (load_config(PretrainConfig, path) for path in (finished_run / "config.yaml", tiny_config))
    given.out = str(finished_run)
    assert saved == given

    encoder = mmvit.load(finished_run / "model")
    sample = IndexedShards([tiny_data / "val-00000.tar"]).read(0)
    (tmp_path / "val0.png").write_bytes(sample.image)
    rows = torch.cat([encoder.encode_image([tmp_path / "val0.png"]), encoder.encode_text([sample.caption])])
    assert rows.shape == (2, 32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_log_has_one_json_line_a_logged_step(finished_run: Path):
    lines = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line in lines:
        computed = set(line) - {"cut_captions", *OF_THE_MACHINE}
        assert computed == {"step", "loss", "lr", "logit_scale", "grad_norm", "param_norm"}
        assert set(OF_THE_MACHINE) - set(line) <= {"mfu"}  # of some machines nobody knows what they can do
        assert all(value > 0 for value in line.values())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["lr"] < lines[0]["lr"] <= 2e-3


def test_finished_run_is_left_alone(
    run_cli: RunCli,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    run = shutil.copytree(finished_run, tmp_path / "renamed")  # its config still says the old folder
    before, times = contents(run), modified(run)
    monkeypatch.chdir(run)
    code, out, err = run_cli("pretrain", "config.yaml", "optim.clip_norm=0.5", "train.keep_last=1")
    assert code == 0, err
    assert "step " not in err  # no line of progress: nothing was trained
    assert out.strip() == f"model: {run / 'model'}"
    said = f"{run}: the run has already finished its 20 steps, nothing was changed"
    assert f"{said}; these settings have no effect: optim.clip_norm\n" in caplog.text
    assert (contents(run), modified(run)) == (before, times)


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_finished_run_goes_on_with_more_steps_or_from_its_model(
    run_cli: RunCli,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    model = load_file(run / "model" / "model.safetensors")
    take_step = Run.step

    def step_beside_another_run(self: Run, step: int, parts: Sequence[Batch]) -> StepResult:
        with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="another run is in progress") as error:
            pool.submit(pretrain, load_config(PretrainConfig, run / "config.yaml", ["out=other"])).result()
        assert error.value.exit_code == 2
        return take_step(self, step, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", step_beside_another_run)
        code, _, err = run_cli("pretrain", run / "config.yaml", "train.steps=22", "train.log_every=1")
    assert code == 0, err
    # Cosine after the warm-up: (1 + cos(pi * 17 / 18)) / 2 of 2e-3, then (1 + cos(pi * 17.8 / 19.8)) / 2.
    assert "learning rate: 1.52e-05 (decay) at step 20 -> 4.99e-05 (decay) at step 21" in caplog.text
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 20, 21, 22]
    assert lines[4]["changed"] == {"train.steps": [20, 22]}
    assert lines[5]["lr"] == pytest.approx(4.99e-5, rel=0.01)

    # A new schedule: a new run from that model. With hardly a rate it ends with the weights that it began with.
    shutil.rmtree(run / "model")
    shutil.copytree(finished_run / "model", run / "model")
    new = ("optim.lr=1e-12", "optim.muon_lr=1e-12", "train.steps=1", f"train.init={run / 'model'}")
    new += (f"out={tmp_path / 'new'}",)
    code, _, err = run_cli("pretrain", run / "config.yaml", *new)
    assert code == 0, err
    weights = load_file(tmp_path / "new" / "model" / "model.safetensors")
    assert weights.keys() == model.keys()
    assert all(torch.allclose(weights[name], model[name], rtol=0, atol=1e-10) for name in model)
    assert [line["step"] for line in read_log(tmp_path / "new" / "log.jsonl")] == [1]


def test_folder_of_a_run_in_progress_is_refused(run_cli: RunCli, finished_run: Path, tiny_config: Path, tmp_path: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    with contextlib.ExitStack() as first, ThreadPoolExecutor(1) as pool:
        pool.submit(first.enter_context, owned(run)).result()
        before = contents(run)
        for setting in ("train.steps=30", "seed=9"):  # the owner is named before settings that differ from its own
            code, out, err = run_cli("pretrain", tiny_config, f"out={run}", setting)
            assert (code, out) == (2, "")
            assert f"the folder is being written by process {os.getpid()} on {socket.gethostname()}" in err
            assert contents(run) == before
        pool.submit(first.close).result()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_of_another_run_is_refused_with_the_difference(run_cli: RunCli, finished_run: Path, tiny_config: Path):
    before = contents(finished_run)
    code, out, err = run_cli("pretrain", tiny_config, f"out={finished_run}", "optim.lr=0.1", "train.log_every=1")
    assert (code, out) == (2, "")
    assert "optim.lr: 0.002 -> 0.1" in err
    assert "log_every" not in err  # it changes no weight, so it may change
    assert "hint:" in err
    assert "Traceback" not in err
    assert contents(finished_run) == before


def test_folder_that_is_no_run_is_refused(run_cli: RunCli, tiny_config: Path, tmp_path: Path):
    (tmp_path / "thesis.doc").write_text("precious")
    code, _, err = run_cli("pretrain", tiny_config, f"out={tmp_path}")
    assert code == 2
    assert "is not empty and not a run folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_start_killed_while_it_claimed_its_folder_does_not_lock_it(run_cli: RunCli, tiny_config: Path, tmp_path: Path):
    (tmp_path / ".config.yaml.tmp-4711").write_text("half a conf")
    code, _, err = run_cli("pretrain", tiny_config, f"out={tmp_path}", "train.steps=1", "data.num_workers=0")
    assert code == 0, err


def test_settings_that_no_run_can_have(run_cli: RunCli, tiny_config: Path, tmp_path: Path):
    cases = {
        "train.step=5": "did you mean 'train.steps'?",
        "optim.name=adam": "did you mean 'adamw'?",
        "train.steps=0": "must be from 1 to",
        "model.image.image_size=33": "not a multiple of patch_size",
        "model.text.width=33": "not divisible by num_heads",
        "model.text.vocab_size=9": "does not fit the tokenizer",
        "tokenizer.path=none.json": "tokenizer file is missing",
        "data.captions=[{source: names.kr}]": "caption 'names.kr' is missing",
        f"data.train={tmp_path}/none-*.tar": "no shards",
    }
    for i, (override, message) in enumerate(cases.items()):
        out = tmp_path / f"run{i}"
        code, _, err = run_cli("pretrain", tiny_config, f"out={out}", "data.num_workers=0", override)
        assert message in err, override
        assert "Traceback" not in err
        assert code == (3 if override.startswith("data") else 2), override
        assert not out.exists()


def test_dry_run_and_print_config_write_nothing(run_cli: RunCli, tiny_config: Path, tmp_path: Path):
    code, out, _ = run_cli("pretrain", tiny_config, f"out={tmp_path / 'run'}", "--dry-run")
    assert code == 0
    assert "300 samples, 20 steps of 32" in out
    code, out, _ = run_cli("pretrain", tiny_config, f"out={tmp_path / 'run'}", "--print-config")
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    assert load_config(PretrainConfig, tmp_path / "printed.yaml").out == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_zero_shot_figures_share_the_line_of_their_step(
    run_cli: RunCli, tiny_config: Path, tiny_data: Path, tmp_path: Path
):
    live = (f"zero_shot.data={tiny_data}/val-*.tar", f"zero_shot.class_names={tiny_data}/names.en.txt")
    steps = ("train.steps=4", "train.log_every=2", "zero_shot.every=2", "zero_shot.limit=10", "data.num_workers=0")
    code, _, err = run_cli("pretrain", tiny_config, f"out={tmp_path / 'run'}", *live, *steps)
    assert code == 0, err
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert 0 <= line["zero_shot_acc1"] <= line["zero_shot_acc5"] <= 1
        assert line["loss"] > 0


def test_print_config_validates_and_prints_a_config_that_loads_as_it_is(
    run_cli: RunCli, tiny_config: Path, tmp_path: Path
):
    (tmp_path / "short.yaml").write_text("data: {train: digits}\nmodel: {image: {kind: swin_t}}\n")
    for verb, config in (("pretrain", tiny_config), ("finetune", tmp_path / "short.yaml")):
        code, out, err = run_cli(verb, config, "train.steps=7", "--print-config")
        assert (code, err) == (0, "")
        (tmp_path / "printed.yaml").write_text(out)
        assert run_cli(verb, tmp_path / "printed.yaml", "--print-config") == (0, out, "")
        code, out, err = run_cli(verb, config, "train.steps=0", "optim.nam=sgd", "lora.rank=2", "--print-config")
        assert (code, out) == (2, "")
        assert "the config has 3 errors" in err
        assert "did you mean 'optim.name'?" in err


def test_held_out_pairs_are_measured_logged_shown_and_plotted(
    run_cli: RunCli, tiny_config: Path, tiny_data: Path, tmp_path: Path
):
    pairs = (f"validation.data={tiny_data}/val-*.tar", "validation.every=2", "validation.samples=30")
    settings = ("train.steps=4", "train.log_every=4", "data.num_workers=0", f"out={tmp_path / 'run'}")
    code, _, err = run_cli("pretrain", tiny_config, *pairs, *settings)
    assert code == 0, err
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4]
    for line in lines:
        assert 0 < line["val_loss"] < 10
        for way in ("image_to_text", "text_to_image"):
            assert 0 <= line[f"val_{way}_r1"] <= line[f"val_{way}_r5"] <= 1
    assert re.search(r"held-out loss \d.*R@1 \d", err)
    code, out, _ = run_cli("plot", tmp_path / "run", "--out", tmp_path / "curves.png", "--json")
    assert code == 0
    assert {"val_loss", "val_text_to_image_r1"} <= json.loads(out)["runs"]["run"].keys()
    code, _, err = run_cli("pretrain", tiny_config, "validation.data=/missing", *settings)
    assert (code, "/missing" in err) == (3, True)
