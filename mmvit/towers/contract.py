"""Interface of all towers: base classes and output."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmvit.layers.patch_embedding import Patches
from mmvit.towers.config import TowerConfig as TowerConfig


class TowerOutput(NamedTuple):
    """One vector per sample and the normalised tokens that it was pooled from; `mask` is False for padding.

    `distilled` is the normalised distillation token, if a tower has one.
    """

    pooled: Float[Tensor, "B D"]
    tokens: Float[Tensor, "B N D"]
    mask: Bool[Tensor, "B N"] | None = None
    distilled: Float[Tensor, "B D"] | None = None


class Tower(nn.Module):
    """An encoder of images or texts; `width` is the dimension D of its output.

    An image tower is called with images and with the patches to keep, or None; `stride` is the number of px of which
    an image's height and width must be multiples.
    """

    width: int
    stride: int
    grid: tuple[int, int] | None = None  # of the learned positions, in patches

    def check_inputs(self, images: Tensor | Patches, keep: Tensor | None = None) -> None:
        """Raise ValueError if an image tower cannot encode such images; only shapes count, so `meta` tensors do."""

    def resampled_tables(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return the learned position tables resampled to another grid, keyed by their names in the state dict."""
        return {}
