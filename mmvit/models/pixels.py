"""Normalisation of uint8 pixels on the model's device."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmvit.layers.patch_embedding import Patches
from mmvit.models.config import CLIP_MEAN as CLIP_MEAN
from mmvit.models.config import CLIP_STD as CLIP_STD

Images = TypeVar("Images", Tensor, Patches)


class PixelNorm(nn.Module):
    """(x / 255 - mean) / std per channel for uint8 images; floats are already normalised and pass through.

    Images are copied to the device as uint8: a quarter of the bytes of float32.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        # One multiply-add; not persistent, because the values are stored in the model folder's `preprocess` block.
        self.register_buffer("scale", (1 / (255 * torch.tensor(std))).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1), persistent=False)

    def forward(self, images: Images) -> Images:
        """Normalise images [B, 3, H, W] or `Patches`, in which the channel varies fastest."""
        if isinstance(images, Patches):
            if images.pixels.dtype != torch.uint8:
                return images
            pixels = images.pixels.unflatten(2, (-1, 3)) * self.scale.flatten() + self.shift.flatten()
            return Patches(pixels.flatten(2), images.grids)
        return images * self.scale + self.shift if images.dtype == torch.uint8 else images
