"""Checkpoints and model folders survive crashes and damage, or report them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmvit.checkpoint.sealed as sealed
from data_tools.core.errors import CheckpointError, MmvitError, ResourceError, UsageError
from mmvit.checkpoint import (
    check_leaves,
    latest_checkpoint,
    load_model,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    save_model,
)
from mmvit.data.tokenizers import TokenizerConfig

RunCli = Callable[..., tuple[int, str, str]]


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {name: {"weight": torch.randn(8, 8, generator=generator)} for name in ("model", "optimizer")}


def save(run: Path, step: int, keep_last: int = 2) -> Path:
    return save_checkpoint(run, step, tensors(step), {"step": step}, keep_last)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0b100
    path.write_bytes(data)


def test_what_was_saved_is_read_back(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    folder = save(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert (found.folder, found.step, found.state) == (folder, 7, {"step": 7})
    assert set(found.tensors) == {"model", "optimizer"}
    for name, group in tensors(7).items():
        assert torch.equal(found.tensors[name]["weight"], group["weight"])


def test_keeps_the_last(tmp_path: Path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    save(tmp_path, 101, keep_last=1)
    assert names(tmp_path) == ["step-00000101"]
    save(tmp_path, 102, keep_last=0)  # the one just written stays in any case
    assert names(tmp_path) == ["step-00000102"]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": lambda path: os.truncate(path, path.stat().st_size - 1),
    "optimizer.safetensors": flip_bit,
    "state.json": Path.unlink,
    "manifest.json": Path.unlink,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGES[name](newest / name)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(newest)
    assert latest_checkpoint(tmp_path).step == 1
    assert str(newest / name) in caplog.text
    assert "resuming at step 1, 1 steps are repeated" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_damaged_manifest_is_named(tmp_path: Path, content: str):
    (save(tmp_path, 1) / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_checkpoint(tmp_path / "checkpoints" / "step-00000001")


@pytest.mark.parametrize("keep_last", [1, 2])
def test_new_checkpoints_are_not_removed_for_damaged_later_ones(tmp_path: Path, keep_last: int):
    for step in (80, 100):
        flip_bit(save(tmp_path, step) / "model.safetensors")
    save(tmp_path, 20, keep_last)
    assert latest_checkpoint(tmp_path).step == 20
    save(tmp_path, 40, keep_last)
    assert latest_checkpoint(tmp_path).step == 40
    assert names(tmp_path) == ["step-00000020", "step-00000040"][-keep_last:]


def test_damaged_step_is_written_again(tmp_path: Path):
    flip_bit(save(tmp_path, 3) / "model.safetensors")
    save(tmp_path, 3)
    assert latest_checkpoint(tmp_path).step == 3


def test_other_format_version_is_refused_and_kept(tmp_path: Path):
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    tree = json.loads(manifest.read_text()) | {"format_version": 99}
    sealed.write_sealed(manifest, tree)
    with pytest.raises(CheckpointError, match="format version 99") as error:
        latest_checkpoint(tmp_path)  # not skipped: resuming from step 1 would eventually remove it
    assert "version of mmvit" in error.value.hint
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_intact_checkpoint_of_the_same_step_is_kept(tmp_path: Path):
    folder = save(tmp_path, 3)
    before = folder.stat().st_ino
    assert save(tmp_path, 3) == folder
    assert folder.stat().st_ino == before


def test_multiples_of_keep_every_stay(tmp_path: Path):
    for step in range(1, 10):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep_last=2, keep_every=3)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 8, 9)]


def test_steps_beyond_eight_digits_are_the_newest(tmp_path: Path):
    for step in (99_999_998, 99_999_999, 100_000_000):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-by-step.txt").write_text("notes")
    assert latest_checkpoint(tmp_path).step == 100_000_000
    assert names(tmp_path) == ["step-100000000", "step-99999999", "step-by-step.txt"]


def test_what_dead_processes_left_is_removed(tmp_path: Path):
    left = tmp_path / "checkpoints" / ".step-00000001.tmp-1-0123abcd"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002"]


def test_leftovers_are_removed_before_the_room_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = tmp_path / "checkpoints" / ".step-00000001.tmp-1-0123abcd"
    left.mkdir(parents=True)
    usage = sealed.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0 if left.exists() else usage.free))
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).step == 2


def test_saved_files_are_as_readable_as_others(tmp_path: Path):
    folder = save(tmp_path, 1)
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_skipped_checkpoints_are_logged_with_the_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (1100, 1150, 1200):
        save(tmp_path, step, keep_last=3)
    folders = tmp_path / "checkpoints"
    (folders / "step-00001200" / "optimizer.safetensors").unlink()
    flip_bit(folders / "step-00001150" / "model.safetensors")
    assert latest_checkpoint(tmp_path).step == 1100
    missing, changed = (record.getMessage() for record in caplog.records)
    assert missing.splitlines() == [
        "step-00001200 is incomplete (optimizer.safetensors is missing); resuming at step 1100, 100 steps are repeated",
        f"  where: {folders / 'step-00001200' / 'optimizer.safetensors'}",
    ]
    assert changed.startswith(
        "step-00001150 is damaged (model.safetensors is truncated or changed); resuming at step 1100, 50"
    )


def test_what_the_disk_does_not_give_is_not_passed_over(tmp_path: Path):
    """It may be intact: resuming without it would remove it."""
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ResourceError, match=r"model\.safetensors cannot be read: Is a directory"):
        latest_checkpoint(tmp_path)


def test_run_without_an_intact_checkpoint_does_not_restart(tmp_path: Path):
    for step in (1, 2):
        flip_bit(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(CheckpointError, match="all checkpoints of this run are damaged") as error:
        latest_checkpoint(tmp_path)
    assert "step-00000001 is damaged" in error.value.what
    assert "move this folder away" in error.value.hint
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path):
    other = save(tmp_path, 1) / "model.safetensors"
    manifest = save(tmp_path, 2) / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"]["../step-00000001/model.safetensors"] = sealed.file_sha256(other)
    del tree["sha256"]
    manifest.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(manifest.parent)


def test_state_that_nobody_restores_is_refused(tmp_path: Path):
    found = read_checkpoint(save(tmp_path, 1))
    check_leaves(found, {"model", "optimizer"}, {"step", "identity"})  # an entry that older versions did not write
    for groups, state, message in (
        ({"model"}, {"step"}, "has optimizer, which this run does not"),
        ({"model", "optimizer"}, set(), "has step, which this run does not"),
        ({"model", "optimizer", "ema"}, {"step"}, "lacks ema"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_leaves(found, groups, state)


def test_weights_of_another_architecture(tmp_path: Path):
    with pytest.raises(CheckpointError, match="another architecture") as error:
        load_weights(torch.nn.Linear(4, 4), torch.nn.Linear(4, 5).state_dict(), where="there")
    assert "size mismatch" in error.value.what
    with pytest.raises(CheckpointError, match="Missing"):
        load_weights(torch.nn.Linear(4, 4), {}, where="there")


# Model folders


@pytest.fixture
def model_folder(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run / "model", tmp_path / "model"))


def test_model_folder_needs_nothing_else(model_folder: Path, finished_run: Path):
    assert sorted(path.name for path in model_folder.iterdir()) == ["mmvit.json", "model.safetensors", "tokenizer.json"]
    assert str(finished_run.parent) not in (model_folder / "mmvit.json").read_text()  # no path into the run
    moved, original = load_model(model_folder), load_model(finished_run / "model")
    assert moved.fingerprint == original.fingerprint == sealed.file_sha256(model_folder / "model.safetensors")
    assert moved.config == original.config
    ids = moved.tokenizer(["red apple", "\uac1c"])
    assert torch.equal(
        moved.model.encode_text(ids), original.model.encode_text(original.tokenizer(["red apple", "\uac1c"]))
    )


def test_not_a_model_folder(run_cli: RunCli, tmp_path: Path):
    code, _, err = run_cli("zero-shot", tmp_path, "a.png", "--classes", "a,b")
    assert code == 2
    assert "not a model folder" in err
    assert "hint: pass the folder of a run" in err
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("damage", [flip_bit, Path.unlink, lambda path: os.truncate(path, 100)])
def test_damaged_weights_are_detected(model_folder: Path, damage: Callable[[Path], Any]):
    damage(model_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(missing|truncated or changed)"):
        load_model(model_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"model": {"embed_dim": 64}}, "weights do not fit the model"),
        ({"model": {"embed_dims": 64}}, "did you mean 'embed_dim'"),
        ({"tokenizer": {"kind": "file", "path": "none.json"}}, "tokenizer file is missing"),
    ],
)
def test_changed_description_is_refused(model_folder: Path, change: dict[str, Any], message: str):
    path = model_folder / "mmvit.json"
    description = json.loads(path.read_text())
    if "model" in change:
        change = {"model": description["model"] | change["model"]}
    path.write_text(json.dumps(description | change))
    with pytest.raises(CheckpointError, match="is damaged") as damaged:
        load_model(model_folder)
    assert 'remove its line "sha256"' in damaged.value.hint
    del description["sha256"]
    path.write_text(json.dumps(description | change))
    with pytest.raises(MmvitError) as error:
        load_model(model_folder)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["model", "preprocess", "tokenizer", "files"])
def test_description_that_lacks_a_part_is_refused(model_folder: Path, key: str):
    path = model_folder / "mmvit.json"
    description = json.loads(path.read_text())
    del description[key], description["sha256"]
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"damaged \(mmvit\.json is truncated or changed\)"):
        load_model(model_folder)


def test_model_folder_keeps_what_a_tokenizer_folder_says(model_folder: Path, tmp_path: Path):
    loaded = load_model(model_folder)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(model_folder / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    tokenizer = TokenizerConfig("file", str(folder))
    save_model(tmp_path / "out", loaded.model, loaded.config, loaded.preprocess, tokenizer)
    shutil.rmtree(folder)
    saved = load_model(tmp_path / "out").tokenizer
    assert loaded.tokenizer(["!"]).tolist()[0][-2] == saved.pad != loaded.tokenizer.pad
    assert saved(["a", "a dog and a cat"]).tolist()[0][-1] == saved.pad
    assert saved.end_of_text == loaded.tokenizer.end_of_text


def test_saving_a_model_replaces_a_model_and_nothing_else(model_folder: Path, tmp_path: Path):
    loaded = load_model(model_folder)
    tokenizer = TokenizerConfig("file", str(model_folder / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("precious")
    with pytest.raises(UsageError, match="not empty and not a model folder"):
        save_model(tmp_path / "out", loaded.model, loaded.config, loaded.preprocess, tokenizer)
    assert (tmp_path / "out" / "thesis.doc").exists()

    leftover = tmp_path / "..copy.new.tmp-4711"
    leftover.mkdir()
    for scale in (1.0, 2.0):
        torch.nn.init.constant_(loaded.model.logit_scale, scale)
        save_model(tmp_path / "copy", loaded.model, loaded.config, loaded.preprocess, tokenizer)
        assert load_model(tmp_path / "copy").model.logit_scale.item() == scale
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model", "out"]
