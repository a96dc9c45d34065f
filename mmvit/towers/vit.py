"""The Vision Transformer."""

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmvit.layers.block import Block
from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.patch_embedding import PatchEmbedding, Patches, patch_grid
from mmvit.layers.pooling import POOLS, AttentionPool
from mmvit.layers.positions import FIXED, LEARNED, POSITIONS, Grid
from mmvit.layers.relative_positions import RelativePositions, relative_position_index
from mmvit.layers.resnet_stem import ResNetStem
from mmvit.layers.rotary import rotary_table
from mmvit.towers.config import Pool as Pool
from mmvit.towers.config import Position as Position
from mmvit.towers.config import ViTConfig as ViTConfig
from mmvit.towers.contract import Tower, TowerOutput


class VisionTransformer(Tower):
    """ViT: patch tokens, class token, positions, pre-norm blocks (Dosovitskiy et al. 2021, section 3.1).

    With `pre_norm` it is CLIP's image tower (Radford et al. 2021, section 2.4), with an `AttentionPool` SigLIP's, with
    a distillation token DeiT (Touvron et al. 2021, section 4). Registers (Darcet et al. 2024) are not among the
    returned tokens. Mean and attention pooling are over the patches.

    Args:
        embed: maps images [B, 3, H, W] to tokens [B, N, D]; a stem makes it a hybrid ViT.
        grid: rows and columns of patches for which the positions are made; for any other they are resampled.
        width: D.
        blocks: transformer blocks, in order.
        position: a name in `POSITIONS`. Class and distillation tokens have positions only in learned tables, registers
            never.
        norm_eps: epsilon of the norms before and after the blocks.
        pool: a name in `POOLS`, or a module; only "class" adds a class token.
        pre_norm: whether there is a norm before the blocks.
        distilled: whether a distillation token follows the class token.
        num_registers: number of register tokens.

    Raises:
        ValueError: a name is unknown, the width does not fit the positions, or a distillation token has no class token.
    """

    def __init__(
        self,
        embed: PatchEmbedding | ConvStem | ResNetStem,
        grid: Grid,
        width: int,
        blocks: Sequence[Block],
        *,
        position: str,
        norm_eps: float,
        pool: str | AttentionPool,
        pre_norm: bool,
        distilled: bool,
        num_registers: int,
    ):
        super().__init__()
        if isinstance(pool, str) and pool not in POOLS:
            raise ValueError(f"pool {pool!r} is unknown; choose from {sorted([*POOLS, 'attention'])}")
        if position not in POSITIONS:
            raise ValueError(f"position {position!r} is unknown; choose from {POSITIONS}")
        if distilled and pool != "class":
            raise ValueError("a distillation token needs a class token: use pool 'class'")
        self.width = width
        self.patch_size = self.stride = embed.patch_size
        self.grid: Grid = grid
        self.position = position
        self.head_width = width // blocks[0].attention.num_heads if blocks else width
        self.num_prefix = (pool == "class") + distilled  # tokens before the patches
        self.embed = embed
        self.class_token = nn.Parameter(torch.empty(width)) if pool == "class" else None
        self.distillation_token = nn.Parameter(torch.empty(width)) if distilled else None
        self.registers = nn.Parameter(torch.empty(num_registers, width)) if num_registers else None
        self.positions: nn.Parameter | None = None
        if position in LEARNED:
            self.positions = nn.Parameter(torch.empty(self.num_prefix + LEARNED[position].num_rows(grid), width))
        self.pre_norm = nn.LayerNorm(width, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.relative: nn.ModuleList | None = None
        if position == "relative":
            num_others = self.num_prefix + num_registers
            self.relative = nn.ModuleList(RelativePositions(grid, b.attention.num_heads, num_others) for b in blocks)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.pool: Callable[..., Tensor] = POOLS[pool] if isinstance(pool, str) else pool
        self.position_table(grid), self._rotary_table(grid)  # raise for a width that does not fit
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise tokens and positions with N(0, 1/width), as OpenAI's CLIP does."""
        for table in (self.positions, self.class_token, self.distillation_token, self.registers):
            if table is not None:
                nn.init.normal_(table, std=self.width**-0.5)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"] | Patches,
        keep: Int[Tensor, "B K"] | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> TowerOutput:
        """Encode normalised images.

        Args:
            images: images of one size that the patch size divides, or `Patches` of several sizes.
            keep: indices of the patches of each image that the blocks process; None for all.
            change: function applied to the embedded patches [B, N, D] before positions are added.

        Raises:
            ValueError: the patch size does not divide the image size, or `Patches` are passed to a stem, with relative
                positions, or with `keep`.
        """
        self.check_inputs(images, keep)
        x, mask = self._embed(images)
        x = x if change is None else change(x)
        rotary = self._at_patches(self._rotary_table, images)
        if (table := self._at_patches(self.position_table, images)) is not None:
            x = x + table.to(x.dtype)
        if keep is not None:
            x, rotary = _take(x, keep), None if rotary is None else _take(rotary.expand(len(x), -1, -1), keep)
        if (first := self._first_tokens()) is not None:
            x = torch.cat([first.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
            mask = None if mask is None else F.pad(mask, (len(first), 0), value=True)
        x = self.pre_norm(x)
        for block, block_mask in zip(self.blocks, self._masks(images, keep, mask), strict=False):
            x = block(x, block_mask, rotary=rotary)
        if self.registers is not None:
            x, mask = x[:, len(self.registers) :], None if mask is None else mask[:, len(self.registers) :]
        tokens = self.norm(x)
        distilled = None if self.distillation_token is None else tokens[:, 1]
        return TowerOutput(self.pool(tokens, mask), tokens, mask, distilled)

    def position_table(self, grid: Grid) -> Float[Tensor, "N D"] | None:
        """Return the position embeddings that are added to the patches of a grid; None if nothing is added."""
        if self.positions is not None:
            kind = LEARNED[self.position]
            return kind.expand(kind.resample(self.positions[self.num_prefix :], self.grid, grid), grid)
        with self.norm.weight.device:
            return FIXED[self.position](grid, self.width) if self.position in FIXED else None

    @torch.no_grad()
    def resampled_tables(self, grid: Grid) -> dict[str, Tensor]:
        """Return the learned position tables resampled to another grid, keyed by their names in the state dict."""
        tables = {}
        if self.positions is not None:
            first, patches = self.positions[: self.num_prefix], self.positions[self.num_prefix :]
            tables["positions"] = torch.cat([first, LEARNED[self.position].resample(patches, self.grid, grid)])
        for i, layer in enumerate(self.relative or ()):
            assert isinstance(layer, RelativePositions)
            tables[f"relative.{i}.offset_bias"] = layer.resampled(grid)
        return tables

    def _rotary_table(self, grid: Grid) -> Float[Tensor, "N d"] | None:
        with self.norm.weight.device:
            return rotary_table(grid, self.head_width) if self.position == "rotary" else None

    def check_inputs(self, images: Tensor | Patches, keep: Tensor | None = None) -> None:
        """Raise ValueError if this tower cannot encode such images."""
        if isinstance(images, Tensor):
            patch_grid(images.shape[2], images.shape[3], self.patch_size)  # a stem does not check
            return
        if not isinstance(self.embed, PatchEmbedding):
            raise ValueError("a convolutional stem needs whole images: it does not support packed patches")
        if self.relative is not None:
            raise ValueError("relative positions need images of one size: they do not support packed patches")
        if keep is not None:
            raise ValueError("patch dropout needs images of one size; packed patches have a patch budget instead")

    def _embed(self, images: Tensor | Patches) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"] | None]:
        dtype = self.norm.weight.dtype
        if isinstance(images, Tensor):
            return self.embed(images.to(dtype)), None
        assert isinstance(self.embed, PatchEmbedding)
        return self.embed.embed_patches(images.pixels.to(dtype)), images.mask()

    def _at_patches(
        self, table: Callable[[Grid], Tensor | None], images: Tensor | Patches
    ) -> Float[Tensor, "#B N D"] | None:
        """Return the row for each patch of the table for its image's grid."""
        if isinstance(images, Tensor):
            rows = table(patch_grid(images.shape[2], images.shape[3], self.patch_size))
            return None if rows is None else rows[None]
        grids, which = images.grids.unique(dim=0, return_inverse=True)
        tables = [rows for height, width in grids.tolist() if (rows := table((height, width))) is not None]
        if not tables:
            return None
        padded = nn.utils.rnn.pad_sequence(tables, batch_first=True)  # [grids, longest, D]
        padded = F.pad(padded, (0, 0, 0, images.pixels.shape[1] - padded.shape[1]))
        return padded[which.to(padded.device)]

    def _first_tokens(self) -> Float[Tensor, "T D"] | None:
        """Return the tokens before the patches: registers, class token, distillation token."""
        tokens: list[Tensor] = [token for token in (self.class_token, self.distillation_token) if token is not None]
        parts: list[Tensor] = [] if self.registers is None else [self.registers]
        if tokens:
            named = torch.stack(tokens)
            parts.append(named if self.positions is None else named + self.positions[: len(tokens)])
        return torch.cat(parts) if parts else None

    def _masks(self, images: Tensor | Patches, keep: Tensor | None, mask: Tensor | None) -> Iterable[Tensor | None]:
        """Return the attention mask of each block."""
        if self.relative is None or not isinstance(images, Tensor):
            return repeat(None if mask is None else mask[:, None, None])
        grid = patch_grid(images.shape[2], images.shape[3], self.patch_size)
        with images.device:
            index = relative_position_index(grid)[None]
        if keep is not None:
            index = index[0, keep[:, :, None], keep[:, None, :]]
        return (layer(grid, index) for layer in self.relative)


def _take(x: Float[Tensor, "B N D"], keep: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    return x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
