"""The Vision Transformer."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmvit.layers.block import Block
from mmvit.layers.pooling import POOLS
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
    pool: str = "class"  # class | mean; only "class" adds a class token
    pre_norm: bool = True  # LayerNorm before the first block, as CLIP has it
    patch_bias: bool = False
    identity_start: bool = False  # zero the blocks' output maps at the start
    stem_channels: list[int] = field(default_factory=list)  # hybrid ViT: a stride-2 convolution a number
    stem_residuals: list[int] = field(default_factory=list)  # residual blocks after each of them


class VisionTransformer(Tower):
    """ViT: patch tokens, class token, learned 1-D positions, pre-norm blocks (Dosovitskiy et al. 2021, section 3.1).

    `embed` maps images [B, 3, H, W] to tokens [B, N, D]: a `PatchEmbedding`, or a `ConvStem` for the hybrid ViT.
    With `pre_norm` it is CLIP's image tower (Radford et al. 2021, section 2.4).
    """

    def __init__(
        self,
        embed: nn.Module,
        num_patches: int,
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
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r} is unknown; choose from {sorted(POOLS)}")
        self.width = width
        self.pool = POOLS[pool]
        self.embed = embed
        self.class_token = nn.Parameter(torch.empty(width)) if pool == "class" else None
        self.positions = nn.Parameter(torch.empty(num_patches + (pool == "class"), width))
        self.pre_norm = nn.LayerNorm(width, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, activation=activation, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class token and positions from N(0, 1/width), as OpenAI's CLIP does."""
        nn.init.normal_(self.positions, std=self.width**-0.5)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=self.width**-0.5)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> TowerOutput:
        """Encode normalised images of the size that the positions were made for."""
        x = self.embed(images)  # [B, N, D]
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.pre_norm(x + self.positions.to(x.dtype))
        for block in self.blocks:
            x = block(x)
        tokens = self.norm(x)
        return TowerOutput(self.pool(tokens), tokens)
