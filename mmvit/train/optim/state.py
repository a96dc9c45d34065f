"""The state of optimizers as tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from data_tools.core.errors import CheckpointError


def flatten_state(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Return all optimizer tensors under flat names, "OPTIMIZER.PARAMETER.ENTRY", for a safetensors file."""
    return {
        f"{i}.{index}.{entry}": torch.as_tensor(value)
        for i, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for entry, value in state.items()
    }


def restore_state(optimizers: list[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that `flatten_state` returned; the optimizers must be built from the same config.

    Raises:
        CheckpointError: a tensor has no parameter, or another shape than it; nothing was changed.
    """
    shapes = {
        f"{i}.{index}": parameter.shape
        for i, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        owner, _, entry = name.rpartition(".")
        if owner not in shapes or value.shape not in (shapes[owner], torch.Size()):
            raise CheckpointError(
                "the optimizer state does not fit the model",
                where=f"{name} of shape {tuple(value.shape)} in optimizer.safetensors",
                note="nothing was changed",
                hint="use the config that the checkpoint was saved with, or start a new run with another out=FOLDER",
            )
        number, index = owner.split(".")
        states[int(number)].setdefault(int(index), {})[entry] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
