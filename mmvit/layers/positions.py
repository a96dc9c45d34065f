"""Position tables, learned or fixed, on any grid of patches."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of patches


def resample_positions(table: Float[Tensor, "N D"], old: Grid, new: Grid) -> Float[Tensor, "M D"]:
    """Resample a position table to another grid; rows before those of the grid (class token) stay unchanged.

    Bicubic with antialiasing (ViT, section 3.2, uses bilinear; bicubic is common practice today). Implemented as one
    matrix per axis, whose gradient is deterministic; that of torch's own resampling is not on a GPU.
    """
    if old == new:
        return table
    num_prefix = len(table) - old[0] * old[1]
    rows, columns = (_axis(a, b).to(table.device) for a, b in zip(old, new, strict=True))
    patches = table[num_prefix:].float().unflatten(0, old)  # [h, w, D]
    with _no_autocast(table.device):
        stretched = torch.einsum("ah,hwd,bw->abd", rows, patches, columns).flatten(0, 1)
    return torch.cat([table[:num_prefix], stretched.to(table.dtype)])


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Disable autocast; the meta device, used to count FLOPs, does not support it."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _axis(old: int, new: int) -> Float[Tensor, "new old"]:
    """Return the weight of each old position in each new one, obtained by resampling one-hot columns."""
    one_hot = torch.eye(old, device="cpu")[None, None]
    return F.interpolate(one_hot, size=(new, old), mode="bicubic", antialias=True)[0, 0]


def resample_axes(table: Float[Tensor, "N D"], old: Grid, new: Grid) -> Float[Tensor, "M D"]:
    """Resample a table whose left half has a row for each column of patches, and whose right half one for each row."""
    if old == new:
        return table
    with _no_autocast(table.device):
        stretched = [
            _axis(a, b).to(table.device) @ half[:a].float()
            for half, a, b in zip(table.chunk(2, dim=1), reversed(old), reversed(new), strict=True)
        ]
    return torch.cat([F.pad(half, (0, 0, 0, max(new) - len(half))) for half in stretched], dim=1).to(table.dtype)


def combine_axes(table: Float[Tensor, "M D"], grid: Grid) -> Float[Tensor, "N D"]:
    """Return [E_X(column); E_Y(row)] for each patch (ViT, appendix D.4)."""
    by_column, by_row = table.chunk(2, dim=1)
    return _on_grid(by_column[: grid[1]], by_row[: grid[0]])


def _on_grid(by_column: Float[Tensor, "w d"], by_row: Float[Tensor, "h d"]) -> Float[Tensor, "N D"]:
    return torch.cat([by_column.repeat(len(by_row), 1), by_row.repeat_interleave(len(by_column), dim=0)], dim=1)


def one_hot(table: Float[Tensor, "N D"], grid: Grid) -> Float[Tensor, "N D"]:
    """Multiply each patch's one-hot index by the table, which selects its row: equivalent to the learned table."""
    return torch.eye(len(table), dtype=table.dtype, device=table.device) @ table


class Learned(NamedTuple):
    """A kind of learned table: its number of rows for a grid, its resampling, and the embedding added to each patch."""

    num_rows: Callable[[Grid], int]
    resample: Callable[[Tensor, Grid, Grid], Tensor]  # rows, their grid, another grid
    expand: Callable[[Tensor, Grid], Tensor]  # to one row per patch


LEARNED = {
    "learned": Learned(math.prod, resample_positions, lambda table, grid: table),
    "one_hot": Learned(math.prod, resample_positions, one_hot),
    "learned_2d": Learned(max, resample_axes, combine_axes),
}


def angles(num_places: int, num_steps: int, base: float = 10000) -> Float[Tensor, "{num_places} {num_steps}"]:
    """Return p * base^(-i / num_steps) for each position p and step i."""
    return torch.arange(num_places)[:, None] * base ** -(torch.arange(num_steps) / num_steps)


def sinusoidal(grid: Grid, width: int) -> Float[Tensor, "N {width}"]:
    """Return sin(p / 10000^(2i / D)) in column 2i and the cosine in 2i + 1, for patches p numbered row by row.

    (Vaswani et al. 2017, section 3.5.) Raises ValueError if the width is odd.
    """
    if width % 2:
        raise ValueError(f"sinusoidal positions need an even width, not {width}")
    waves = angles(math.prod(grid), width // 2)
    return torch.stack([waves.sin(), waves.cos()], dim=2).flatten(1)


def sincos_2d(grid: Grid, width: int) -> Float[Tensor, "N {width}"]:
    """Return sines and cosines of the column, then of the row, D/4 of each (MoCo v3, Chen et al. 2021; MAE).

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"position sincos_2d needs a width that is a multiple of 4, not {width}")
    by_row, by_column = (angles(side, width // 4) for side in grid)
    return _on_grid(*(torch.cat([waves.sin(), waves.cos()], dim=1) for waves in (by_column, by_row)))


FIXED = {"sinusoidal": sinusoidal, "sincos_2d": sincos_2d}
# "relative" is added to attention scores (relative_positions.py), "rotary" rotates queries and keys (rotary.py).
POSITIONS = sorted([*LEARNED, *FIXED, "none", "relative", "rotary"])
