"""Patch embedding: pixels to patch tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn


class Patches(NamedTuple):
    """A batch of images of different shapes as flat patches, padded with zeros to the longest (NaFlex, SigLIP 2).

    Attributes:
        pixels: [B, N, F] in the order of `patchify`, F = P*P*3; uint8, or normalised floats.
        grids: [B, 2], rows and columns of patches; kept on the CPU, they are read without a device synchronisation.
    """

    pixels: Tensor
    grids: Tensor

    def mask(self) -> Bool[Tensor, "B N"]:
        """Return True for the patches of images, False for padding."""
        num_patches = self.grids.prod(dim=1).to(self.pixels.device)
        return torch.arange(self.pixels.shape[1], device=self.pixels.device) < num_patches[:, None]


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches; raises ValueError if the patch size does not divide the image size."""
    if height % patch_size or width % patch_size:
        fits = [max(side // patch_size, 1) * patch_size for side in (height, width)]
        raise ValueError(
            f"an image of {height}x{width} px is not divisible into patches of {patch_size} px; "
            f"{fits[0]}x{fits[1]} px or other multiples of {patch_size} fit"
        )
    return height // patch_size, width // patch_size


def patchify(images: Shaped[Tensor, "B C H W"], patch_size: int) -> Shaped[Tensor, "B N F"]:
    """Cut images into flat patches [B, H*W/P^2, P*P*C], row by row; the channel varies fastest (ViT, section 3.1)."""
    patch_grid(images.shape[2], images.shape[3], patch_size)
    patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, C, h, P, w, P]
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Shaped[Tensor, "B N F"], patch_size: int, grid: tuple[int, int]) -> Shaped[Tensor, "B C H W"]:
    """Invert `patchify` exactly; `grid` is (rows, columns) of patches."""
    pixels = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # [B, h, w, P, P, C]
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbedding(nn.Module):
    """Linear projection of patches, written as a convolution with kernel = stride = P (ViT, equation 1)."""

    def __init__(self, patch_size: int, width: int, *, bias: bool = True):
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Embed each patch; raises ValueError if the patch size does not divide the image size."""
        patch_grid(images.shape[2], images.shape[3], self.patch_size)
        return self.projection(images).flatten(2).transpose(1, 2)

    def embed_patches(self, patches: Float[Tensor, "B N F"]) -> Float[Tensor, "B N D"]:
        """Embed patches cut by `patchify`."""
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P*P*3]
        return F.linear(patches, weight, self.projection.bias)
