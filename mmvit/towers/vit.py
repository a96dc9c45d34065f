"""The Vision Transformer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmvit.layers.block import Block
from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.patch_embedding import PatchEmbedding, Patches, patch_grid
from mmvit.layers.pooling import POOLS, AttentionPool
from mmvit.layers.positions import Grid, resample_positions
from mmvit.towers.contract import Tower, TowerOutput


@dataclass
class ViTConfig:
    """Shape of a ViT; the defaults are those of CLIP ViT-B/32."""

    image_size: int = 224  # px
    patch_size: int = 32  # px
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    norm_eps: float = 1e-5
    pool: str = "class"  # class | mean | attention; only "class" adds a class token
    pre_norm: bool = True  # LayerNorm before the first block, as CLIP has it
    patch_bias: bool = False
    identity_start: bool = False  # zero the blocks' output maps at the start
    stem_channels: list[int] = field(default_factory=list)  # hybrid ViT: a stride-2 convolution a number
    stem_residuals: list[int] = field(default_factory=list)  # residual blocks after each of them


class VisionTransformer(Tower):
    """ViT: patch tokens, class token, learned 1-D positions, pre-norm blocks (Dosovitskiy et al. 2021, section 3.1).

    `embed` maps images [B, 3, H, W] to tokens [B, N, D]: a `PatchEmbedding`, or a `ConvStem` for the hybrid ViT.
    `grid` is the rows and columns of patches that the positions are made for; for any other they are resampled.
    With `pre_norm` it is CLIP's image tower (Radford et al. 2021, section 2.4), with pool "attention" SigLIP's.
    """

    def __init__(
        self,
        embed: PatchEmbedding | ConvStem,
        grid: Grid,
        width: int,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
        pool: str,
        pre_norm: bool,
    ):
        super().__init__()
        names = sorted([*POOLS, "attention"])
        if pool not in names:
            raise ValueError(f"pool {pool!r} is unknown; choose from {names}")
        self.width = width
        self.patch_size = embed.patch_size
        self.grid = grid
        self.embed = embed
        self.class_token = nn.Parameter(torch.empty(width)) if pool == "class" else None
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1] + (pool == "class"), width))
        self.pre_norm = nn.LayerNorm(width, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, activation=activation, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.pool: Callable[..., Tensor]
        if pool == "attention":
            self.pool = AttentionPool(width, num_heads, mlp_ratio=mlp_ratio, activation=activation, norm_eps=norm_eps)
        else:
            self.pool = POOLS[pool]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class token and positions from N(0, 1/width), as OpenAI's CLIP does."""
        nn.init.normal_(self.positions, std=self.width**-0.5)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=self.width**-0.5)

    def forward(
        self, images: Float[Tensor, "B 3 H W"] | Patches, keep: Int[Tensor, "B K"] | None = None
    ) -> TowerOutput:
        """Encode normalised images.

        Args:
            images: of one size, any that the patch size divides, or `Patches` of several.
            keep: the patches of each image that the blocks see; None for all.

        Raises:
            ValueError: a size that the patch size does not divide; `Patches` for a stem, or with `keep`.
        """
        if isinstance(images, Patches):
            if keep is not None:
                raise ValueError("patches are dropped from images of one size; shapes that differ have a patch budget")
            x, mask = self._embed_patches(images)
        else:
            grid = patch_grid(images.shape[2], images.shape[3], self.patch_size)
            x, mask = self.embed(images.to(self.positions.dtype)), None  # [B, N, D]
            x = x + self._positions(grid).to(x.dtype)
            if keep is not None:
                x = x.gather(1, keep[:, :, None].expand(-1, -1, self.width))
        if self.class_token is not None:
            first = (self.class_token + self.positions[0]).to(x.dtype)
            x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
            mask = None if mask is None else torch.cat([mask.new_ones(len(x), 1), mask], dim=1)
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x, None if mask is None else mask[:, None, None])
        tokens = self.norm(x)
        return TowerOutput(self.pool(tokens, mask), tokens, mask)

    def _embed_patches(self, patches: Patches) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"]]:
        if not isinstance(self.embed, PatchEmbedding):
            raise ValueError("a convolutional stem needs whole images, not patches: it looks beyond their borders")
        x = self.embed.embed_patches(patches.pixels.to(self.positions.dtype))
        grids, which = patches.grids.unique(dim=0, return_inverse=True)
        rows = [self._positions((height, width)) for height, width in grids.tolist()]
        table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [grids, longest, D]
        table = nn.functional.pad(table, (0, 0, 0, x.shape[1] - table.shape[1]))
        return x + table[which.to(x.device)].to(x.dtype), patches.mask()

    def _positions(self, grid: Grid) -> Float[Tensor, "N D"]:
        """Return those of the patches alone."""
        return resample_positions(self.positions, self.grid, grid)[self.class_token is not None :]
