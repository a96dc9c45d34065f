"""The Convolutional vision Transformer."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.layers.drop_path import DropPath, drop_path_rates
from mmvit.layers.feed_forward import FeedForward
from mmvit.layers.patch_embedding import Patches
from mmvit.layers.positions import Grid
from mmvit.towers.config import CvTConfig as CvTConfig
from mmvit.towers.contract import Tower, TowerOutput


class ConvolutionalEmbedding(nn.Module):
    """Convolutional embedding of overlapping patches, then LayerNorm over channels (Wu et al. 2021, section 3.1).

    The padding is half of the overlap of patches, rounded up: 2 for 7 px with stride 4, 1 for 3 with stride 2, as in
    the released code. A side of n strides becomes n tokens, any other floor((side + 2 * padding - patch) / stride) + 1.
    """

    def __init__(self, channels: int, width: int, *, patch_size: int, stride: int, norm_eps: float):
        super().__init__()
        if not 1 <= stride <= patch_size:
            raise ValueError(f"stride {stride} must be between 1 and patch_size {patch_size}")
        padding = (patch_size - stride + 1) // 2
        self.projection = nn.Conv2d(channels, width, patch_size, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Embed each patch."""
        x = self.projection(maps.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvolutionalAttention(nn.Module):
    """Attention with convolutional projections of query, key and value (Wu et al. 2021, section 3.2, equation 2).

    Each projection is a depthwise 3x3 convolution, BatchNorm and a linear layer, together a separable convolution.
    Those of key and value have stride 2, which keeps a quarter of the tokens. The class token skips the convolutions.

    As in the released code and in transformers, scores are divided by the square root of the whole width, not of the
    head's.
    """

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool = True):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = width**-0.5
        self.q_neighbours = _depthwise(width, stride=1)
        self.k_neighbours = _depthwise(width, stride=2)
        self.v_neighbours = _depthwise(width, stride=2)
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        """Attend within each row: the positions of a feature map, with or without a class token before them."""
        maps = as_map(x, grid)
        class_token = x[:, : x.shape[1] - grid[0] * grid[1]]  # [B, 1 or 0, D]
        q, k, v = (
            linear(_join(class_token, neighbours(maps))).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for neighbours, linear in (
                (self.q_neighbours, self.q),
                (self.k_neighbours, self.k),
                (self.v_neighbours, self.v),
            )
        )  # [B, H, N or M, d_h]
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


class CvTBlock(nn.Module):
    """Pre-norm block with convolutional attention (Wu et al. 2021, figure 2b)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
        qkv_bias: bool,
        drop_path: float,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = ConvolutionalAttention(width, num_heads, qkv_bias=qkv_bias)
        self.feed_forward_norm = nn.LayerNorm(width, eps=norm_eps)
        self.feed_forward = FeedForward(width, round(width * mlp_ratio), activation)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        """Apply self-attention, then the feed-forward network."""
        x = x + self.drop_path(self.attention(self.attention_norm(x), grid), 0)
        return x + self.drop_path(self.feed_forward(self.feed_forward_norm(x)), 1)


class CvTStage(nn.Module):
    """A convolutional embedding and blocks, with or without a class token."""

    def __init__(self, embed: ConvolutionalEmbedding, blocks: Sequence[CvTBlock], class_token: nn.Parameter | None):
        super().__init__()
        self.embed = embed
        self.class_token = class_token
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B N D"], Grid]:
        """Return the tokens, class token first, and the rows and columns of the others."""
        x = self.embed(maps)
        grid = (x.shape[2], x.shape[3])
        x = as_tokens(x)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class CvT(Tower):
    """CvT: stages with fewer and wider tokens each, without positions (Wu et al. 2021, section 3 and table 2).

    Lists have one number per stage. Only the last stage has a class token, which is the pooled output. `stride` is the
    product of the strides; any image of at least that size is accepted, since each convolution rounds its output down.

    Drop path increases linearly from 0 to `drop_path` over the blocks of the last stage; the others have none, as in
    the released configs. transformers uses one rate for all blocks of a stage.

    The convolutional projections have BatchNorm, like the paper and the released weights. In training mode an
    embedding therefore depends on the other images of the rank's batch: on the batch size and on the split into ranks,
    micro-batches and gradient-cache chunks. In evaluation mode it depends on its image alone.
    `nn.SyncBatchNorm.convert_sync_batchnorm` synchronises the statistics over ranks and keeps all parameter names;
    BatchNorm modules in `eval()` mode keep their statistics while the rest trains.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        patch_sizes: Sequence[int],
        strides: Sequence[int],
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
        qkv_bias: bool,
        drop_path: float,
    ):
        super().__init__()
        lists = {"widths": widths, "depths": depths, "num_heads": num_heads}
        lists |= {"patch_sizes": patch_sizes, "strides": strides}
        if len({len(numbers) for numbers in lists.values()}) > 1 or not widths:
            shown = ", ".join(f"{name} {list(numbers)}" for name, numbers in lists.items())
            raise ValueError(f"a CvT needs one number per stage in each list: {shown}")
        self.width = widths[-1]
        self.stride = math.prod(strides)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            last = i == len(widths) - 1
            sizes = {"patch_size": patch_sizes[i], "stride": strides[i]}
            embed = ConvolutionalEmbedding(widths[i - 1] if i else 3, width, norm_eps=norm_eps, **sizes)
            blocks = [
                CvTBlock(
                    width,
                    num_heads[i],
                    mlp_ratio=mlp_ratio,
                    activation=activation,
                    norm_eps=norm_eps,
                    qkv_bias=qkv_bias,
                    drop_path=rate,
                )
                for rate in drop_path_rates(drop_path if last else 0.0, depth)
            ]
            self.stages.append(CvTStage(embed, blocks, nn.Parameter(torch.empty(width)) if last else None))
        self.norm = nn.LayerNorm(self.width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise matrices and the class token with N(0, 0.02^2) truncated at 2; kernels keep torch's default.

        As in the released code. A norm follows every kernel, so its initial scale does not matter.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, CvTStage) and module.class_token is not None:
                nn.init.trunc_normal_(module.class_token, std=0.02)

    def forward(
        self, images: Float[Tensor, "B 3 H W"] | Patches, keep: Int[Tensor, "B K"] | None = None
    ) -> TowerOutput:
        """Encode normalised images of one size.

        Raises:
            ValueError: a side is shorter than `stride`, or `Patches` or `keep` are passed.
        """
        self.check_inputs(images, keep)
        assert isinstance(images, Tensor)
        maps = images.to(self.norm.weight.dtype)
        for stage in self.stages:
            x, grid = stage(maps)
            maps = as_map(x, grid)
        tokens = self.norm(x)
        return TowerOutput(tokens[:, 0], tokens)

    def check_inputs(self, images: Tensor | Patches, keep: Tensor | None = None) -> None:
        """Raise ValueError for a side shorter than `stride`, and for patches."""
        if isinstance(images, Patches) or keep is not None:
            raise ValueError("a CvT needs whole images: it supports neither patch dropout nor packed patches")
        height, width = images.shape[2:]
        if min(height, width) < self.stride:
            raise ValueError(
                f"an image of {height}x{width} px is too small for this tower; use sides of {self.stride} px or more"
            )


def as_map(tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B D h w"]:
    """Arrange tokens in rows and columns, without the class token before them; a view in channels-last format."""
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def as_tokens(maps: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N D"]:
    """Flatten a feature map into a sequence of tokens; a view if it is in channels-last format."""
    return maps.flatten(2).transpose(1, 2)


def _depthwise(width: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


def _join(class_token: Float[Tensor, "B one D"], maps: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N D"]:
    tokens = as_tokens(maps)
    return torch.cat([class_token, tokens], dim=1) if class_token.shape[1] else tokens  # torch.cat would copy
