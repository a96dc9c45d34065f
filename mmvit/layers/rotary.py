"""Rotary position embedding on a grid of patches."""

import torch
from jaxtyping import Float
from torch import Tensor

from mmvit.layers.positions import Grid, angles


def rotary_table(grid: Grid, head_width: int, base: float = 100.0) -> Float[Tensor, "N {head_width}"]:
    """Return cosines, then sines, of the angles by which the pairs of each patch's query and key are rotated.

    Half of the pairs rotate with the row and half with the column, with frequencies base^(-4i / d_h) (RoPE-ViT, Heo et
    al. 2024, section 3.1, axial version).

    Raises:
        ValueError: the head width is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(f"rotary positions need heads whose width is a multiple of 4, not {head_width}")
    by_row, by_column = (angles(side, head_width // 4, base) for side in grid)
    both = torch.cat([by_row.repeat_interleave(grid[1], dim=0), by_column.repeat(grid[0], 1)], dim=1)  # [N, d_h / 2]
    return torch.cat([both.cos(), both.sin()], dim=1)


def rotate(x: Float[Tensor, "B H T d"], table: Float[Tensor, "#B N d"]) -> Float[Tensor, "B H T d"]:
    """Rotate the pairs (x_i, x_(i + d/2)) of the last N tokens; the tokens before them have no position in the image.

    The product of a query and a key then depends on the two positions only through their difference (RoFormer, Su et
    al. 2021, equation 16).
    """
    prefix, patches = x.split([x.shape[2] - table.shape[1], table.shape[1]], dim=2)
    (a, b), (cosines, sines) = patches.chunk(2, dim=3), table[:, None].chunk(2, dim=3)
    rotated = torch.cat([a * cosines - b * sines, a * sines + b * cosines], dim=3)
    return torch.cat([prefix, rotated.to(x.dtype)], dim=2)
