"""Less memory and less overhead for each transformer block, without a change of its numbers or of its names."""

import functools
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from data_tools.core.errors import UsageError
from mmvit.layers.block import Block
from mmvit.towers.cvt import CvTBlock
from mmvit.towers.swin import SwinBlock

# Results that cost much to compute; the rest (norms, activations, casts, sums) is computed again from them.
_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


BLOCKS = (Block, SwinBlock, CvTBlock)
MODES = ("none", "selective", "full")


@functools.cache
def _recomputed(kind: type[nn.Module], mode: str) -> type[nn.Module]:
    """Return the class of a block that computes again what it did not keep.

    It keeps its input alone (Chen et al. 2016), or what `KEPT` names too (Korthikanti et al. 2022, section 5).
    """
    more: dict[str, Any] = {"context_fn": _keep} if mode == "selective" else {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **more, **kwargs)

    return type(f"{mode.capitalize()}Recomputed{kind.__name__}", (kind,), {"forward": forward, "plain": kind})


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Have each block of `model` compute activations again in the backward pass: none, a selection, or all of them.

    Weights, their names and gradients stay the same, bit for bit where the device computes the same twice. The blocks
    get another class and nothing else, so that copies of the model do likewise.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing {mode!r} is unknown; choose from {sorted(MODES)}")
    for block in _blocks(model, "train.checkpointing" if mode != "none" else ""):
        plain = getattr(type(block), "plain", type(block))
        block.__class__ = plain if mode == "none" else _recomputed(plain, mode)  # type: ignore[arg-type]


def _keep() -> Any:
    return create_selective_checkpoint_contexts(KEPT)


def compile_blocks(model: nn.Module) -> None:
    """Have each block of `model` compiled when it is first called; blocks of one shape share the work.

    Sizes that change from step to step (text lengths, stages of a curriculum) are compiled once more, for any size.

    Raises:
        UsageError: there is no C++ compiler, or no header of Python for it.
    """
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        hint = "install g++ (apt-get install g++), or name a compiler in CXX, or set train.compile=false"
        raise UsageError("no C++ compiler was found, which torch.compile needs", where="train.compile", hint=hint)
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        hint = "install them (apt-get install python3-dev), or set train.compile=false"
        raise UsageError("the headers of Python are missing", where=str(headers), hint=hint)
    # Towers, depths of their inputs, stages and evaluation each bring a graph; beyond the limit nothing is compiled.
    torch._dynamo.config.recompile_limit = 32
    for block in _blocks(model, "train.compile"):
        block.compile()


def _blocks(model: nn.Module, key: str) -> list[nn.Module]:
    """Return the blocks; raises UsageError where there are none and the setting `key`, if any, wants them."""
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, BLOCKS)]
    if key and not blocks:
        what = f"{key} works block by block, and the model has no transformer blocks that it knows"
        raise UsageError(what, where=key, hint=f"leave out {key}, or choose a ViT, Swin or CvT")
    return blocks
