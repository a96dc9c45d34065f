"""The ResNet stem that replaces the patch embedding in the hybrid ViT."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NUM_GROUPS = 32


class StandardizedConv(nn.Conv2d):
    """A convolution whose kernels are standardised to mean 0 and variance 1 in each forward (Qiao et al. 2019, 3.1).

    It pads like TensorFlow's SAME: for stride 2 and even sides, less on the left and top than on the right and
    bottom. The published weights are trained with this padding.
    """

    eps = 1e-8  # as in timm; the JAX code adds 1e-5 to the standard deviation

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, bias=False)
        total = max(kernel_size - stride, 0)
        self.pads = (total // 2, total - total // 2) * 2  # left, right, above, below

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ _ _"]:
        """Convolve a feature map; for sides that the stride does not divide, the padding differs from SAME."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + self.eps)
        return F.conv2d(F.pad(x, self.pads), weight, stride=self.stride)


class ResidualUnit(nn.Module):
    """1x1, 3x3 and 1x1 standardised convolutions with GroupNorm and a shortcut (BiT, Kolesnikov et al. 2020).

    The norms follow the convolutions, unlike in BiT itself but as in the hybrid ViT's released code.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = StandardizedConv(in_channels, channels, 1)
        self.norm1 = nn.GroupNorm(NUM_GROUPS, channels)
        self.conv2 = StandardizedConv(channels, channels, 3, stride)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, channels)
        self.conv3 = StandardizedConv(channels, out_channels, 1)
        self.norm3 = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = StandardizedConv(in_channels, out_channels, 1, stride)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(NUM_GROUPS, out_channels))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ _ _"]:
        """Apply the residual unit."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNetStem(nn.Module):
    """A ResNet's first stages, then a 1x1 projection: the hybrid ViT (Dosovitskiy et al. 2021, section 3.1).

    `depths` lists the residual units of each stage: (3, 4, 9) is ResNet-50 with its fourth stage moved into the third,
    for tokens of 16 px (appendix B.1); each stage after the first doubles the token size. `channels` is the number of
    channels after the first convolution. GroupNorm has 32 groups and epsilon 1e-5, as in timm; the JAX code has 1e-6.
    """

    def __init__(self, depths: Sequence[int], width: int, *, channels: int = 64):
        super().__init__()
        self.patch_size = 2 ** (len(depths) + 1)
        # SAME padding for max pooling: zeros are enough, because a ReLU comes before.
        first = [StandardizedConv(3, channels, 7, stride=2), nn.GroupNorm(NUM_GROUPS, channels), nn.ReLU()]
        self.first = nn.Sequential(*first, nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, stride=2))
        self.stages = nn.Sequential()
        in_channels = channels
        for i, depth in enumerate(depths):
            units = []
            for j in range(depth):
                units.append(ResidualUnit(in_channels, channels * 2**i, stride=2 if i and not j else 1))
                in_channels = 4 * channels * 2**i
            self.stages.append(nn.Sequential(*units))
        self.projection = nn.Conv2d(in_channels, width, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each residual unit as its shortcut, as the released code does."""
        for module in self.modules():
            if isinstance(module, ResidualUnit):
                nn.init.zeros_(module.norm3.weight)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Embed overlapping patches; height and width must be multiples of the patch size."""
        return self.projection(self.stages(self.first(images))).flatten(2).transpose(1, 2)
