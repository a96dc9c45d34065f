"""Learned positions on another grid than their own."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of patches


def resample_positions(table: Float[Tensor, "N D"], old: Grid, new: Grid) -> Float[Tensor, "M D"]:
    """Stretch a position table to another grid; a row before those of the grid, the class token's, stays as it is.

    Bicubic with antialiasing (ViT, section 3.2, has bilinear; the field has settled on this). Written as one matrix for
    each axis, whose gradient is the same in each run; that of torch's own resampling is not on a GPU.
    """
    if old == new:
        return table
    num_prefix = len(table) - old[0] * old[1]
    rows, columns = (_axis(a, b).to(table.device) for a, b in zip(old, new, strict=True))
    patches = table[num_prefix:].float().unflatten(0, old)  # [h, w, D]
    stretched = torch.einsum("ah,hwd,bw->abd", rows, patches, columns).flatten(0, 1)
    return torch.cat([table[:num_prefix], stretched.to(table.dtype)])


def _axis(old: int, new: int) -> Float[Tensor, "new old"]:
    """The share that each old place has in each new one, read off by resampling one-hot columns."""
    one_hot = torch.eye(old, device="cpu")[None, None]
    return F.interpolate(one_hot, size=(new, old), mode="bicubic", antialias=True)[0, 0]
