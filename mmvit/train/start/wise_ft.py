"""WiSE-FT (Wortsman et al. 2022, section 3): the exported weights lie between those at the start and the trained."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def interpolated(start: nn.Module, end: Model, share: float) -> Model:
    """Return a copy of `end` with the weights (1 - share) * start + share * end; what is no float is that of `end`."""
    before, mixed = start.state_dict(), copy.deepcopy(end)
    mixed.load_state_dict({name: _mixed(before[name], tensor, share) for name, tensor in end.state_dict().items()})
    return mixed


def _mixed(start: Tensor, end: Tensor, share: float) -> Tensor:
    return torch.lerp(start.to(end.device), end, share) if end.is_floating_point() else end
