"""What every tower is and returns."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn


class TowerOutput(NamedTuple):
    """One vector a sample and the normalised tokens that it was pooled from; `mask` is False for those that fill up."""

    pooled: Float[Tensor, "B D"]
    tokens: Float[Tensor, "B N D"]
    mask: Bool[Tensor, "B N"] | None = None


class Tower(nn.Module):
    """An encoder of images or texts; `width` is the D of its output.

    An image tower is called with images and with the patches to keep, or None, and has a `patch_size` in px.
    """

    width: int
    patch_size: int
