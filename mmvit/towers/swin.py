"""The Swin Transformer."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mmvit.layers.attention import Attention
from mmvit.layers.drop_path import DropPath, drop_path_rates
from mmvit.layers.feed_forward import FeedForward
from mmvit.layers.patch_embedding import PatchEmbedding, Patches
from mmvit.layers.positions import Grid
from mmvit.layers.relative_positions import relative_position_index, resample_offsets
from mmvit.towers.config import SwinConfig as SwinConfig
from mmvit.towers.contract import Tower, TowerOutput

# Added to the scores of masked pairs, as in the released code. It is finite so that softmax is defined for every row;
# exp(-100) is 4e-44.
HIDDEN = -100.0


def window_partition(x: Shaped[Tensor, "B h w C"], window_size: int) -> Shaped[Tensor, "Bn N C"]:
    """Partition feature maps into windows of M x M, N = M*M, row by row; `window_size` M must divide their sides."""
    windows = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))  # [B, h/M, M, w/M, M, C]
    return windows.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def window_reverse(windows: Shaped[Tensor, "Bn N C"], window_size: int, grid: Grid) -> Shaped[Tensor, "B h w C"]:
    """Invert `window_partition`; `grid` is the rows and columns of the feature map."""
    counts = (-1, grid[0] // window_size, grid[1] // window_size)
    x = windows.unflatten(1, (window_size, window_size)).unflatten(0, counts)  # [B, h/M, w/M, M, M, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_masks(window_size: int, shift: int) -> Float[Tensor, "4 N N"]:
    """Return the attention masks of shifted windows (Liu et al. 2021, figure 4), which separate non-adjacent regions.

    The cyclic shift moves the first rows below the last ones, so only the last row and column of windows contain
    patches that were not adjacent. There are thus four masks, whatever the size of the feature map: for a window in
    neither the last row nor the last column, in the last column only, in the last row only, and in both.
    """
    wrapped = torch.arange(window_size) >= window_size - shift
    rows, columns = (side.flatten() for side in torch.meshgrid(wrapped, wrapped, indexing="ij"))
    apart = [side[:, None] != side for side in (rows, columns)]  # [N, N] each
    hidden = torch.stack([torch.zeros_like(apart[0]), apart[1], apart[0], apart[0] | apart[1]])
    return hidden * HIDDEN


class PatchMerging(nn.Module):
    """Merge every 2x2 patches into one of twice the width: LayerNorm over the four, then a linear layer (section 3.1).

    The order is [00, 10, 01, 11] in (row, column), as in the released weights.
    """

    def __init__(self, width: int, *, norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=norm_eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h2 w2 C2"]:
        """Halve height and width."""
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h/2, 2, w/2, 2, C]
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinBlock(nn.Module):
    """Pre-norm block with attention within windows (Liu et al. 2021, equation 3).

    Scores have a learned bias for each offset between two patches: softmax(Q K^T / sqrt(d) + B) V (equation 4). With a
    `shift` the windows are moved by that many patches down and right, except along a side that one window spans.
    A feature map that the window does not divide is padded with zeros at the bottom and right before the shift, as in
    torchvision, transformers and the authors' detection code (timm shifts first); the padding is attended to.
    With `merges`, for the first block of a stage, the block begins with patch merging and its input has half its width.
    """

    shift_masks: Tensor
    index: Tensor

    def __init__(
        self,
        width: int,
        num_heads: int,
        window_size: int,
        *,
        shift: int,
        merges: bool,
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
        drop_path: float,
    ):
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.merge = PatchMerging(width // 2, norm_eps=norm_eps) if merges else nn.Identity()
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads)
        self.relative_positions = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.feed_forward_norm = nn.LayerNorm(width, eps=norm_eps)
        self.feed_forward = FeedForward(width, round(width * mlp_ratio), activation)
        self.drop_path = DropPath(drop_path)
        self.register_buffer("index", relative_position_index((window_size, window_size)), persistent=False)
        self.register_buffer("shift_masks", shift_masks(window_size, shift), persistent=False)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h2 w2 C2"]:
        """Apply patch merging (first block of a stage), windowed self-attention and the feed-forward network."""
        x = self.merge(x)
        x = x + self.drop_path(self.attend(self.attention_norm(x)), 0)
        return x + self.drop_path(self.feed_forward(self.feed_forward_norm(x)), 1)

    def attend(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Apply self-attention within windows, W-MSA or SW-MSA."""
        height, width = x.shape[1:3]
        pad = (-height % self.window_size, -width % self.window_size)
        if any(pad):
            x = F.pad(x, (0, 0, 0, pad[1], 0, pad[0]))
        grid = (x.shape[1], x.shape[2])
        there, back = self._moves(grid, x.device)
        windows = x.flatten(1, 2).index_select(1, there).unflatten(1, (-1, self.window_size**2)).flatten(0, 1)
        windows = self.attention(windows, self.score_bias(len(x), grid))  # [B * windows, N, C]
        x = windows.unflatten(0, (len(x), -1)).flatten(1, 2).index_select(1, back).unflatten(1, grid)
        return x[:, :height, :width]

    def _moves(self, grid: Grid, device: torch.device) -> tuple[Int[Tensor, " places"], Int[Tensor, " places"]]:
        """Return the indices that gather windows from a feature map, and those that gather it from windows.

        They combine the cyclic shift with the partition, and their inverses. Applied as indices, they cost one copy of
        the feature map in each direction instead of three.
        """
        shift = tuple(self.shift if side > self.window_size else 0 for side in grid)
        places = torch.arange(grid[0] * grid[1], device=device)
        there = window_partition(places.view(1, *grid, 1).roll((-shift[0], -shift[1]), dims=(1, 2)), self.window_size)
        back = window_reverse(places.view(-1, self.window_size**2, 1), self.window_size, grid).roll(shift, dims=(1, 2))
        return there.flatten(), back.flatten()

    def score_bias(self, batch_size: int, grid: Grid) -> Float[Tensor, "Bn H N N"]:
        """Return the bias added to the scores: one for all windows, or if shifted, with the mask of each window."""
        bias = F.embedding(self.index, self.relative_positions).permute(2, 0, 1)  # [H, N, N]
        rows, columns = (side // self.window_size for side in grid)
        if not self.shift or rows == columns == 1:
            return bias[None]
        last_row = torch.arange(rows, device=bias.device) == (rows - 1 if rows > 1 else -1)
        last_column = torch.arange(columns, device=bias.device) == (columns - 1 if columns > 1 else -1)
        which = 2 * last_row.long()[:, None] + last_column  # [rows, columns]
        biases = (bias + self.shift_masks[:, None])[which.flatten()]
        return biases.expand(batch_size, -1, -1, -1, -1).flatten(0, 1)


class SwinTransformer(Tower):
    """Windowed attention over feature maps at 1/4, 1/8, 1/16 and 1/32 of the image size (Liu et al. 2021).

    `depths` and `num_heads` have one number per stage. Between stages 2x2 patches merge and the width doubles. Every
    second block of a stage shifts its windows by half. The output is the mean of the last stage's normalised tokens.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        window_size: int,
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
        drop_path: float,
    ):
        super().__init__()
        if len(depths) != len(num_heads) or min(depths, default=0) < 1:
            raise ValueError(
                f"depths {list(depths)} and num_heads {list(num_heads)} need one number per stage, depths of 1 or more"
            )
        self.width = width * 2 ** (len(depths) - 1)
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.patch_size = patch_size
        self.window_size = window_size
        self.grid: Grid = (window_size, window_size)
        self.ends = [end - 1 for end in accumulate(depths)]  # the last block of each stage
        self.embed = PatchEmbedding(patch_size, width)
        self.pre_norm = nn.LayerNorm(width, eps=norm_eps)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.blocks = nn.ModuleList(
            SwinBlock(
                width * 2**stage,
                num_heads[stage],
                window_size,
                shift=window_size // 2 if i % 2 else 0,
                merges=stage > 0 and i == 0,
                mlp_ratio=mlp_ratio,
                activation=activation,
                norm_eps=norm_eps,
                drop_path=next(rates),
            )
            for stage, depth in enumerate(depths)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(self.width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise linear layers and position biases with N(0, 0.02^2) truncated at 2, as in the released code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, SwinBlock):
                nn.init.trunc_normal_(module.relative_positions, std=0.02)

    @torch.no_grad()
    def resampled_tables(self, grid: Grid) -> dict[str, Tensor]:
        """Return the position biases of all blocks, resampled to another window size as the released code does.

        The released code's bicubic kernel is slightly sharper than the one used here for all tables.
        """
        names = (f"blocks.{i}.relative_positions" for i in range(len(self.blocks)))
        return {name: resample_offsets(self.get_parameter(name), self.grid, grid) for name in names}

    def forward(
        self, images: Float[Tensor, "B 3 H W"] | Patches, keep: Int[Tensor, "B K"] | None = None
    ) -> TowerOutput:
        """Encode normalised images of one size.

        Raises:
            ValueError: the size does not fit (see `grids`), or `Patches` or `keep` are passed.
        """
        self.check_inputs(images, keep)
        assert isinstance(images, Tensor)
        tokens = self.norm(self.pyramid(images)[-1]).flatten(1, 2)  # [B, N, D]
        return TowerOutput(tokens.mean(dim=1), tokens)

    def check_inputs(self, images: Tensor | Patches, keep: Tensor | None = None) -> None:
        """Raise ValueError if the size does not fit (see `grids`), or `Patches` or `keep` are passed."""
        if isinstance(images, Patches) or keep is not None:
            raise ValueError("a Swin needs whole images: it supports neither patch dropout nor packed patches")
        self.grids(images.shape[2], images.shape[3])

    def pyramid(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B h w C"]]:
        """Return the feature map of each stage, before the last norm: strides 4, 8, 16, 32, widths C, 2C, 4C, 8C."""
        first = self.grids(images.shape[2], images.shape[3])[0]
        x = self.pre_norm(self.embed(images.to(self.norm.weight.dtype))).unflatten(1, first)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                maps.append(x)
        return maps

    def grids(self, height: int, width: int) -> list[Grid]:
        """Return the rows and columns of each stage's feature map for an image of `height` x `width` px.

        Raises:
            ValueError: the stride does not divide the sides, or a window is larger than a feature map.
        """
        image = f"an image of {height}x{width} px"
        if height % self.stride or width % self.stride:
            fits = "x".join(str(max(math.ceil(side / self.stride), 1) * self.stride) for side in (height, width))
            raise ValueError(
                f"{image} does not fit: its sides must be multiples of {self.stride} px, such as {fits} px"
            )
        strides = [self.patch_size * 2**stage for stage in range(len(self.ends))]
        grids = [(height // stride, width // stride) for stride in strides]
        for stage, grid in enumerate(grids, 1):
            if min(grid) < self.window_size:
                raise ValueError(
                    f"{image} has a feature map of {grid[0]}x{grid[1]} in stage {stage}, less than window_size "
                    f"{self.window_size}; use sides of {self.window_size * self.stride} px or more, "
                    f"or a window_size of at most {min(grids[-1])}"
                )
        return grids
