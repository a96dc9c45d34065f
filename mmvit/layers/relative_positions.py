"""Learned attention biases by the offset between two patches."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.layers.positions import Grid, resample_positions


def relative_position_index(window: Grid) -> Int[Tensor, "N N"]:
    """Return the row of the bias table for each query and key: (dr + h - 1)(2w - 1) + (dc + w - 1).

    dr and dc are the query's row and column minus the key's (Swin, Liu et al. 2021, section 3.2).
    """
    height, width = window
    rows, columns = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    row_offsets, column_offsets = (axis[:, None] - axis for axis in (rows, columns))
    return (row_offsets + height - 1) * (2 * width - 1) + column_offsets + width - 1


def resample_offsets(table: Float[Tensor, "old H"], old: Grid, new: Grid) -> Float[Tensor, "new H"]:
    """Resample a table with a row for each offset between patches of a grid to the offsets in another grid."""
    return resample_positions(table, _offsets(old), _offsets(new))


class RelativePositions(nn.Module):
    """Attention biases of one layer: one number per head and offset between patches (Shaw et al. 2018).

    Each of the `num_prefix` tokens before the patches has a bias to every prefix token, one to all patches and
    one from all patches, as the class token has in BEiT (Bao et al. 2022).
    """

    def __init__(self, grid: Grid, num_heads: int, num_prefix: int):
        super().__init__()
        self.grid = grid
        self.offset_bias = nn.Parameter(torch.empty(math.prod(_offsets(grid)), num_heads))
        self.prefix_bias = nn.Parameter(torch.empty(num_heads, num_prefix, num_prefix + 2)) if num_prefix else None
        for table in self.parameters():
            nn.init.normal_(table, std=0.02)

    def resampled(self, grid: Grid) -> Float[Tensor, "offsets H"]:
        """Return the table for the offsets in another grid."""
        return resample_offsets(self.offset_bias, self.grid, grid)

    def forward(self, grid: Grid, index: Int[Tensor, "B K K"]) -> Float[Tensor, "B H T T"]:
        """Return the biases, T = num_prefix + K; `index` holds row numbers of the table for `grid`."""
        bias = self.resampled(grid)[index].movedim(3, 1)  # [B, H, K, K]
        if self.prefix_bias is None:
            return bias
        num_prefix, shape = self.prefix_bias.shape[1], (*bias.shape[:3], -1)
        among, to_patches, from_patches = self.prefix_bias.split([num_prefix, 1, 1], dim=2)
        above = torch.cat([among, to_patches.expand(-1, -1, bias.shape[3])], dim=2)  # [H, num_prefix, T]
        below = torch.cat([from_patches.mT.expand(shape), bias], dim=3)  # [B, H, K, T]
        return torch.cat([above.expand(len(bias), -1, -1, -1), below], dim=2)


def _offsets(grid: Grid) -> Grid:
    return 2 * grid[0] - 1, 2 * grid[1] - 1
