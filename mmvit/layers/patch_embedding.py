"""From pixels to patch tokens."""

from jaxtyping import Float
from torch import Tensor, nn


def patchify(images: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N F"]:
    """Cut images into flat patches [B, H*W/P^2, P*P*C], row by row; the channel varies fastest (ViT, section 3.1)."""
    height, width = images.shape[-2:]
    _check_divisible(height, width, patch_size)
    patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, C, h, P, w, P]
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Float[Tensor, "B N F"], patch_size: int, grid: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """Invert `patchify` bit for bit; `grid` is (rows, columns) of patches."""
    pixels = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # [B, h, w, P, P, C]
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbedding(nn.Module):
    """Linear projection of patches, written as a convolution with kernel = stride = P (ViT, equation 1)."""

    def __init__(self, patch_size: int, width: int, *, bias: bool = True):
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Embed each patch; raises ValueError where the patch size does not divide the image."""
        _check_divisible(images.shape[-2], images.shape[-1], self.patch_size)
        return self.projection(images).flatten(2).transpose(1, 2)


def _check_divisible(height: int, width: int, patch_size: int) -> None:
    if height % patch_size or width % patch_size:
        fits = [max(side // patch_size, 1) * patch_size for side in (height, width)]
        raise ValueError(
            f"an image of {height}x{width} px is not divisible into patches of {patch_size} px; "
            f"{fits[0]}x{fits[1]} px or other multiples of {patch_size} fit"
        )
