"""The size of a model, known before it is built."""

import os
from collections.abc import Callable

import torch
from torch import nn

from data_tools.core.errors import UsageError
from mmvit.towers.contract import TowerConfig
from mmvit.towers.timm_tower import TimmConfig


def check_size(build: Callable[[], nn.Module], image: TowerConfig) -> None:
    """Raise UsageError if the model that `build` returns needs more memory than the machine has.

    It is built without memory, except with a model of timm, whose size is no setting.
    """
    if isinstance(image, TimmConfig):
        return
    with torch.device("meta"):
        model = build()
    tensors = [*model.parameters(), *model.buffers()]
    needed, there = sum(tensor.numel() * tensor.element_size() for tensor in tensors), machine_memory()
    if needed > there:
        raise UsageError(
            f"the model has {sum(p.numel() for p in model.parameters()) / 1e9:.1f} G parameters and needs "
            f"{needed / 2**30:.1f} GiB; this machine has {there / 2**30:.1f} GiB",
            where="model",
            note="nothing was started",
            hint="decrease width, depth, image size or vocabulary",
        )


def machine_memory() -> int:
    """Return the memory of this machine, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
