"""What every tower is and returns."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmvit.layers.patch_embedding import Patches


@dataclass
class TowerConfig:
    """What all image towers have; `kind` is a name in TOWERS, whose values are the defaults of the others."""

    kind: str = ""
    image_size: int = 224  # px

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

    def check_inputs(self, images: Tensor | Patches, keep: Tensor | None = None) -> None:
        """Raise ValueError if an image tower cannot encode such images; only shapes count, so `meta` tensors do."""

    def resampled_tables(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return the learned position tables for another grid, by their names in the state dict."""
        return {}
