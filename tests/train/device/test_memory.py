"""Blocks that compute activations again, or are compiled, give the same numbers under the same names."""

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmvit.train.device.memory as memory
from data_tools.core.errors import UsageError
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.device.memory import checkpoint_activations, compile_blocks

RANK = Path(__file__).with_name("memory_rank.py")


def build(width: int = 64, depth: int = 4) -> DualEncoder:
    torch.manual_seed(0)
    image = ViTConfig(image_size=32, patch_size=4, width=width, depth=depth, num_heads=2)
    text = TextConfig(vocab_size=60, context_length=16, end_of_text=59, width=width, depth=depth, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(embed_dim=32, caption_depth=1, image=image, text=text))


def loss(model: DualEncoder, length: int = 8, batch_size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 58, (batch_size, 1, length), generator=generator)
    ids[..., -1] = 59
    embeddings = model(torch.randint(0, 256, (batch_size, 3, 32, 32), generator=generator, dtype=torch.uint8), ids)
    logits = embeddings.logit_scale * embeddings.image @ embeddings.text[:, 0].T
    return (
        torch.nn.functional.cross_entropy(logits, torch.arange(batch_size)) + embeddings.caption_logits.square().mean()
    )


def gradients(model: DualEncoder, length: int = 8) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, length).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class LiveBytes(TorchDispatchMode):
    """The most bytes that the results of operations have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name not in self.known:
            self.known.add(name)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, name, size)

    def remove(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.live -= size


def peak_bytes(model: DualEncoder) -> int:
    model.zero_grad()
    with LiveBytes() as counter:
        loss(model).backward()
    return counter.peak


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_bit_for_bit(mode: str):
    model = build()
    names, plain = list(model.state_dict()), gradients(model)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    checkpoint_activations(model, mode)
    again = gradients(model)
    assert list(model.state_dict()) == names
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_less_is_held_the_more_is_computed_again():
    peaks = {}
    for mode in ("none", "selective", "full"):
        model = build()
        checkpoint_activations(model, mode)
        peaks[mode] = peak_bytes(model)
    print(peaks)
    assert peaks["selective"] < 0.85 * peaks["none"]
    assert peaks["full"] < 0.5 * peaks["none"]


def test_copy_of_a_model_has_blocks_of_its_own():
    model = build(depth=1)
    checkpoint_activations(model, "full")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert gradients(other)["text_tower.blocks.0.attention.q.weight"].abs().sum() > 0


def test_evaluation_needs_no_gradient():
    model = build(depth=1)
    with torch.no_grad():
        before = loss(model)
        checkpoint_activations(model, "selective")
        assert torch.equal(loss(model), before)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'some' is unknown"):
        checkpoint_activations(build(depth=1), "some")


def test_machine_without_a_compiler_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"a C\+\+ compiler, and none was found") as error:
        compile_blocks(build(depth=1))
    assert "train.compile=false" in error.value.hint


def test_machine_without_headers_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(memory.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(memory.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="Python headers, and they are missing"):
        compile_blocks(build(depth=1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_processes_with_recomputation_compute_the_same(mode: str, tmp_path: Path):
    """DDP over two processes, compiled blocks, texts of many lengths: as one process that compiles nothing."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(RANK), mode, str(tmp_path / "store")]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
