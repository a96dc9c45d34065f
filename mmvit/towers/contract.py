"""What every tower is and returns."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class TowerOutput(NamedTuple):
    """One vector a sample and the normalised tokens that it was pooled from."""

    pooled: Float[Tensor, "B D"]
    tokens: Float[Tensor, "B N D"]


class Tower(nn.Module):
    """An encoder of images or texts; `width` is the D of its output."""

    width: int
