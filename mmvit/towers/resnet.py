"""CLIP's modified ResNet."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.layers.patch_embedding import Patches, patch_grid
from mmvit.layers.positions import Grid, resample_positions
from mmvit.towers.config import ResNetConfig as ResNetConfig
from mmvit.towers.contract import Tower, TowerOutput


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, all with stride 1, and a shortcut (He et al. 2016, section 4.1).

    Average pooling reduces the feature map, so that no pixel is skipped (anti-aliasing, Zhang 2019).
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(self.pool, conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ _ _"]:
        """Apply the residual block."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(self.pool(y)))
        return F.relu(y + self.shortcut(x))


class MapAttentionPool(nn.Module):
    """Attention pooling: the mean of a feature map attends to its positions (Radford et al. 2021, section 2.4).

    Position embeddings are added to the mean and to the feature map; `grid` is their rows and columns. The output
    projection is included, so that the result has `out_width` and not the feature map's width.
    """

    def __init__(self, grid: Grid, width: int, num_heads: int, out_width: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"the last feature map's {width} channels are not divisible by num_heads {num_heads}")
        self.grid: Grid = grid
        self.num_heads = num_heads
        self.positions = nn.Parameter(torch.empty(1 + grid[0] * grid[1], width))
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, out_width)

    def forward(self, x: Float[Tensor, "B C h w"]) -> TowerOutput:
        """Pool a feature map; the tokens are out(v(x)) of each position, as if it had attention weight 1."""
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + resample_positions(self.positions, self.grid, grid).to(x.dtype)
        values = self.v(x)
        q, k, v = self._heads(self.q(x[:, :1])), self._heads(self.k(x)), self._heads(values)  # [B, H, 1 or 1 + N, d_h]
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, 1, C]
        out = self.out(torch.cat([pooled, values[:, 1:]], dim=1))
        return TowerOutput(out[:, 0], out[:, 1:])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ModifiedResNet(Tower):
    """ResNet with a three-convolution stem, average pooling and attention pooling (Radford et al. 2021, section 2.4).

    `grid` is the rows and columns of the last feature map, for which the positions are made; for any other they are
    resampled. The tokens are those that the pooling attends to (see `MapAttentionPool`; Zhou et al. 2022, section 3.2,
    use them to segment images with CLIP); there is no token for the mean and no class token.

    BatchNorm computes its statistics from each rank's own part of the batch, so that the result of training depends on
    how a batch is split over ranks; that of a ViT or of the hybrid's GroupNorm does not.
    """

    def __init__(self, grid: Grid, width: int, depths: Sequence[int], stem_width: int, num_heads: int):
        super().__init__()
        self.width = width
        self.stride = 2 ** (len(depths) + 1)
        self.grid: Grid = grid
        layers: list[nn.Module] = []
        for before, after, stride in (
            (3, stem_width // 2, 2),
            (stem_width // 2, stem_width // 2, 1),
            (stem_width // 2, stem_width, 1),
        ):
            conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.stem = nn.Sequential(*layers, nn.AvgPool2d(2))
        self.stages = nn.Sequential()
        in_channels = stem_width
        for i, depth in enumerate(depths):
            channels = stem_width * 2**i
            blocks = [Bottleneck(in_channels, channels, stride=2 if i else 1)]
            in_channels = 4 * channels
            blocks += [Bottleneck(in_channels, channels, stride=1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
        self.pool = MapAttentionPool(grid, in_channels, num_heads, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as OpenAI's CLIP does: the pooling by its width, each block's last norm with zero."""
        std = self.pool.q.in_features**-0.5
        for tensor in (self.pool.positions, *(getattr(self.pool, name).weight for name in ("q", "k", "v", "out"))):
            nn.init.normal_(tensor, std=std)
        for module in self.stages.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)

    def forward(
        self, images: Float[Tensor, "B 3 H W"] | Patches, keep: Int[Tensor, "B K"] | None = None
    ) -> TowerOutput:
        """Encode normalised images of one size.

        Raises:
            ValueError: the stride does not divide the image size, or `Patches` or `keep` are passed.
        """
        self.check_inputs(images, keep)
        assert isinstance(images, Tensor)
        return self.pool(self.stages(self.stem(images.to(self.pool.positions.dtype))))

    def check_inputs(self, images: Tensor | Patches, keep: Tensor | None = None) -> None:
        """Raise ValueError for a size that the stride does not divide, and for patches."""
        if isinstance(images, Patches) or keep is not None:
            raise ValueError("a ResNet needs whole images: it supports neither patch dropout nor packed patches")
        patch_grid(images.shape[2], images.shape[3], self.stride)

    @torch.no_grad()
    def resampled_tables(self, grid: Grid) -> dict[str, Tensor]:
        """Return the position table resampled to another grid, keyed by its name in the state dict."""
        return {"pool.positions": resample_positions(self.pool.positions, self.grid, grid)}
