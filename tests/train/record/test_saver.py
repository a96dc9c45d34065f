"""Checkpoints are written beside the training: copies, one at a time, errors told to the one who waits."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

import mmvit.train.record.saver as saver_module
from data_tools.core.errors import ResourceError
from mmvit.checkpoint import latest_checkpoint, save_checkpoint
from mmvit.train.record.saver import Saver

Groups = dict[str, dict[str, Tensor]]


def leaves(step: int, device: str = "cpu") -> Groups:
    """Tensors of the kinds that a state holds: views of one buffer, a transposed one, a scalar, half floats, none."""
    generator = torch.Generator().manual_seed(step)
    flat = torch.randn(64, generator=generator).to(device)
    return {
        "model": {"a": flat[:32].view(4, 8), "b": flat[32:], "scale": flat[0].clone(), "t": flat.view(8, 8).clone().T},
        "optimizer": {"half": flat.bfloat16(), "step": torch.tensor(float(step)), "none": torch.empty(0)},
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Gate:
    """Holds each save at its start until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.started, self.opened = Event(), Event()
        monkeypatch.setattr(saver_module, "save_checkpoint", self.save)

    def save(self, *arguments: Any) -> Path:
        self.started.set()
        assert self.opened.wait(60)
        return save_checkpoint(*arguments)


def test_same_bytes_as_at_once(tmp_path: Path):
    state = {"step": 3, "nested": {"list": [1, 2.5, None]}}
    at_once = save_checkpoint(tmp_path / "a", 3, leaves(3), state, keep_last=2)
    saver = Saver(tmp_path / "b", keep_last=2)
    saver.save(3, leaves(3), state)
    saver.wait()
    assert contents(tmp_path / "b" / "checkpoints" / at_once.name) == contents(at_once)


def test_state_may_change_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    saver, now, state = Saver(tmp_path, keep_last=2), leaves(1), {"counts": [1]}
    saver.save(1, now, state)
    assert gate.started.wait(60)
    assert latest_checkpoint(tmp_path) is None  # nothing is written yet, and the step goes on
    now["model"]["a"].zero_()
    state["counts"].append(2)
    gate.opened.set()
    saver.wait()
    found = latest_checkpoint(tmp_path)
    assert torch.equal(found.tensors["model"]["a"], leaves(1)["model"]["a"])
    assert found.state == {"counts": [1]}


def test_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, keep_last=2, keep_every=1)
    saver.save(1, leaves(1), {})
    assert saver._thread is not None
    join = saver._thread.join

    def open_and_join() -> None:
        gate.opened.set()
        join()

    monkeypatch.setattr(saver._thread, "join", open_and_join)  # is waited for, or the gate stays shut
    for step in (2, 3, 4):
        saver.save(step, leaves(step), {})
    saver.wait()
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "2", "3", "4"]
    assert torch.equal(latest_checkpoint(tmp_path).tensors["model"]["b"], leaves(4)["model"]["b"])


def test_memory_of_the_copies_is_used_again(tmp_path: Path):
    saver = Saver(tmp_path, keep_last=2)
    saver.save(1, leaves(1), {})
    before = {name: copy.data_ptr() for name, copy in saver._copies["model"].items()}
    grown = leaves(2)
    grown["model"]["b"] = torch.ones(50)
    del grown["optimizer"]
    saver.save(2, grown, {})
    saver.wait()
    after = {name: copy.data_ptr() for name, copy in saver._copies["model"].items()}
    assert [name for name in before if before[name] != after[name]] == ["b"]
    found = latest_checkpoint(tmp_path)
    assert set(found.tensors) == {"model"}
    assert torch.equal(found.tensors["model"]["b"], torch.ones(50))


def test_error_is_seen_without_waiting_and_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = saver_module.save_checkpoint

    def full(*arguments: Any) -> Path:
        raise ResourceError("the disk is full")

    saver = Saver(tmp_path, keep_last=2)
    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    saver.save(1, leaves(1), {})
    assert saver._thread is not None
    saver._thread.join(60)
    assert saver.failed()
    with pytest.raises(ResourceError, match="the disk is full"):
        saver.save(2, leaves(2), {})
    assert not saver.failed()
    saver.wait()
    monkeypatch.setattr(saver_module, "save_checkpoint", real)
    saver.save(3, leaves(3), {})
    saver.wait()
    assert latest_checkpoint(tmp_path).step == 3


@pytest.mark.gpu
def test_copies_from_a_gpu_are_pinned_and_equal(tmp_path: Path):
    saver, now = Saver(tmp_path, keep_last=2), leaves(1, "cuda")
    for step in (1, 2):
        saver.save(step, now, {})
        assert saver._copies["model"]["a"].is_pinned()
        now["model"]["b"].zero_()
    saver.wait()
    found = latest_checkpoint(tmp_path)
    assert torch.equal(found.tensors["model"]["a"], leaves(1)["model"]["a"])
    assert not found.tensors["model"]["b"].any()
