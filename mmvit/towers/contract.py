"""What every tower is and returns."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmvit.keys import key


@dataclass
class TowerConfig:
    """What all image towers have; `kind` is a name in TOWERS, whose values are the defaults of the others."""

    kind: str = key("", "name of the image tower; it sets the defaults of the other keys")
    image_size: int = key(224, "side of an image, px", ge=1)

    @property
    def stride(self) -> int:
        """Return the px of which the sides of an image must be multiples."""
        raise NotImplementedError


class TowerOutput(NamedTuple):
    """One vector a sample and the normalised tokens that it was pooled from; `mask` is False for those that fill up.

    `distilled` is the normalised distillation token, where a tower has one.
    """

    pooled: Float[Tensor, "B D"]
    tokens: Float[Tensor, "B N D"]
    mask: Bool[Tensor, "B N"] | None = None
    distilled: Float[Tensor, "B D"] | None = None


class Tower(nn.Module):
    """An encoder of images or texts; `width` is the D of its output.

    An image tower is called with images and with the patches to keep, or None; `stride` is the px of which the sides
    of an image must be multiples.
    """

    width: int
    stride: int
    grid: tuple[int, int] | None = None  # that learned positions are for, in patches

    def resampled_tables(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return the learned position tables for another grid, by their names in the state dict."""
        return {}
