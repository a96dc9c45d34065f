"""Activation checkpointing and compilation of transformer blocks; results and parameter names stay the same."""

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

# Results that are expensive to compute; the rest (norms, activations, casts, sums) is recomputed from them.
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
    """Return a subclass of the block that recomputes its activations in the backward pass.

    It keeps only its input (Chen et al. 2016), or the results in `KEPT` too (Korthikanti et al. 2022, section 5).
    """
    more: dict[str, Any] = {"context_fn": _keep} if mode == "selective" else {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **more, **kwargs)

    return type(f"{mode.capitalize()}Recomputed{kind.__name__}", (kind,), {"forward": forward, "plain": kind})


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Make each block of `model` recompute none, a selection, or all of its activations in the backward pass.

    Weights, their names and gradients stay the same, bit for bit on a deterministic device. Only the class of the
    blocks changes, so that copies of the model do the same.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing {mode!r} is unknown; choose from {sorted(MODES)}")
    for block in _blocks(model, "train.checkpointing" if mode != "none" else ""):
        plain = getattr(type(block), "plain", type(block))
        block.__class__ = plain if mode == "none" else _recomputed(plain, mode)  # type: ignore[arg-type]


def _keep() -> Any:
    return create_selective_checkpoint_contexts(KEPT)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of `model` at its first call; blocks of the same shape share the compiled code.

    When a size changes (text length, stage of a curriculum), the block is compiled once more with dynamic shapes.

    Raises:
        UsageError: a C++ compiler or the Python headers are missing.
    """
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        hint = "install g++ (apt-get install g++), or set CXX to a compiler, or train.compile=false"
        raise UsageError("torch.compile needs a C++ compiler, and none was found", where="train.compile", hint=hint)
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        hint = "install them (apt-get install python3-dev), or set train.compile=false"
        raise UsageError("torch.compile needs the Python headers, and they are missing", where=str(headers), hint=hint)
    # Each tower, input shape, stage and evaluation needs a graph; beyond the limit nothing is compiled.
    torch._dynamo.config.recompile_limit = 32
    for block in _blocks(model, "train.compile"):
        block.compile()


def _blocks(model: nn.Module, key: str) -> list[nn.Module]:
    """Return the blocks; raise UsageError if there are none and the setting `key`, if any, needs them."""
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, BLOCKS)]
    if key and not blocks:
        what = f"{key} needs transformer blocks, and the model has none that are supported"
        raise UsageError(what, where=key, hint=f"remove {key}, or choose a ViT, Swin or CvT")
    return blocks
