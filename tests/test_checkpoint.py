"""Checkpoints and model folders survive what befalls files, or say what befell them."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mmvit.checkpoint as checkpoint
from data_tools.errors import CheckpointError, MmvitError, UsageError
from mmvit.checkpoint import latest_checkpoint, load_model, load_weights, read_checkpoint, save_checkpoint, save_model

Told = Callable[..., tuple[int, str, str]]


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
    assert "passed over" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_damaged_manifest_is_named(tmp_path: Path, content: str):
    (save(tmp_path, 1) / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_checkpoint(tmp_path / "checkpoints" / "step-00000001")


@pytest.mark.parametrize("keep_last", [1, 2])
def test_new_checkpoints_are_not_removed_for_damaged_later_ones(tmp_path: Path, keep_last: int):
    for step in (80, 100):
        flip_bit(save(tmp_path, step) / "model.safetensors")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 20, keep_last)
    assert latest_checkpoint(tmp_path).step == 20
    save(tmp_path, 40, keep_last)
    assert latest_checkpoint(tmp_path).step == 40
    assert names(tmp_path) == ["step-00000020", "step-00000040"][-keep_last:]


def test_step_that_was_damaged_is_written_anew(tmp_path: Path):
    flip_bit(save(tmp_path, 3) / "model.safetensors")
    save(tmp_path, 3)
    assert latest_checkpoint(tmp_path).step == 3


def test_other_format_version_is_refused_and_kept(tmp_path: Path):
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99") as error:
        latest_checkpoint(tmp_path)  # not passed over: going on from step 1 would in time remove it
    assert "version of mmvit" in error.value.mend
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


OPERATIONS = ("fsync", "replace", "mkdir", "open", "unlink", "rmdir")


class Failing:
    """File operations of which number `fatal`, counted from 0, fails, and all later ones too where `for_ever`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fatal: int, error: BaseException, for_ever: bool):
        self.count, self.fatal, self.error, self.for_ever = 0, fatal, error, for_ever
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(checkpoint, "save_file", self.wrap(save_file))

    def wrap(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == self.fatal or (self.for_ever and number > self.fatal):
                raise self.error
            return operation(*args, **kwargs)

        return wrapped


class Killed(BaseException):
    """Stands for the end of the process: nothing after it gets to disk."""


def count_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    run = tmp_path / "counted"
    save(run, 1)
    with monkeypatch.context() as patch:
        counter = Failing(patch, fatal=-2, error=Killed(), for_ever=False)
        save(run, 2, keep_last=1)
    return counter.count


@pytest.mark.parametrize("killed", [False, True], ids=["disk full", "killed"])
def test_save_that_fails_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, killed: bool
):
    """Every file operation of a save in turn: a full disk once, or the end of the process."""
    error = Killed() if killed else OSError(errno.ENOSPC, "No space left on device")
    total = count_operations(tmp_path, monkeypatch)
    assert total > 15
    outcomes = []
    for fatal in range(total):
        run = tmp_path / str(fatal)
        save(run, 1)
        with monkeypatch.context() as patch:
            Failing(patch, fatal, error, for_ever=killed)
            failed = False
            try:
                save(run, 2, keep_last=1)
            except type(error):
                failed = True
        found = latest_checkpoint(run)
        assert torch.equal(found.tensors["model"]["weight"], tensors(found.step)["model"]["weight"])
        if failed:
            outcomes.append(found.step)
        else:
            assert found.step == 2  # a folder that is there already need not be made
        if not killed:
            assert set(names(run)) <= {"step-00000001", "step-00000002"}  # nothing half done is left
        save(run, 3, keep_last=1)
        assert names(run) == ["step-00000003"]  # and what a kill left is cleared away
    assert len(outcomes) >= total - 1
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}
    # Passed over is only what was being removed as too old.
    assert all("step-00000001" in record.getMessage() for record in caplog.records)


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
    assert moved.fingerprint == original.fingerprint == checkpoint.file_sha256(model_folder / "model.safetensors")
    assert moved.config == original.config
    ids = moved.tokenizer(["red apple", "\uac1c"])
    assert torch.equal(
        moved.model.encode_text(ids), original.model.encode_text(original.tokenizer(["red apple", "\uac1c"]))
    )


def test_model_folder_that_is_none(told: Told, tmp_path: Path):
    code, _, err = told("zero-shot", tmp_path, "a.png", "--classes", "a,b")
    assert code == 4
    assert "this is not a model folder" in err
    assert "mend: give the model/ folder that a run writes" in err
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("damage", [flip_bit, Path.unlink, lambda path: os.truncate(path, 100)])
def test_damaged_weights_are_detected(model_folder: Path, damage: Callable[[Path], Any]):
    damage(model_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(missing|cut or changed)"):
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
    with pytest.raises(MmvitError) as error:
        load_model(model_folder)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["model", "preprocess", "tokenizer", "files"])
def test_description_that_lacks_a_part_is_refused(model_folder: Path, key: str):
    path = model_folder / "mmvit.json"
    description = json.loads(path.read_text())
    del description[key]
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_model(model_folder)


def test_model_folder_keeps_what_a_tokenizer_folder_says(model_folder: Path, tmp_path: Path):
    loaded = load_model(model_folder)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(model_folder / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    tokenizer = checkpoint.TokenizerConfig("file", str(folder))
    save_model(tmp_path / "out", loaded.model, loaded.config, loaded.preprocess, tokenizer)
    shutil.rmtree(folder)
    saved = load_model(tmp_path / "out").tokenizer
    assert saved(["!"]).tolist()[0][-2] == saved.pad != loaded.tokenizer.pad
    assert saved.end_of_text == loaded.tokenizer.end_of_text


def test_saving_a_model_replaces_a_model_and_nothing_else(model_folder: Path, tmp_path: Path):
    loaded = load_model(model_folder)
    tokenizer = checkpoint.TokenizerConfig("file", str(model_folder / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("precious")
    with pytest.raises(UsageError, match="something else"):
        save_model(tmp_path / "out", loaded.model, loaded.config, loaded.preprocess, tokenizer)
    assert (tmp_path / "out" / "thesis.doc").exists()

    leftover = tmp_path / "..copy.new.tmp-4711"
    leftover.mkdir()
    for scale in (1.0, 2.0):
        torch.nn.init.constant_(loaded.model.logit_scale, scale)
        save_model(tmp_path / "copy", loaded.model, loaded.config, loaded.preprocess, tokenizer)
        assert load_model(tmp_path / "copy").model.logit_scale.item() == scale
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model", "out"]


def test_messages_say_where_and_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    flip_bit(save(tmp_path, 2) / "model.safetensors")
    assert latest_checkpoint(tmp_path) is None
    assert "cut or changed" in caplog.text
    assert "no checkpoint of this run can be read" in caplog.text
