"""A small convolutional stem in place of the patch embedding."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions, then a 1x1 projection: the hybrid ViT in small (ViT, section 3.1; Xiao et al. 2021).

    n convolutions give tokens of 2^n px. Normalisation is GroupNorm, 16 channels a group, and not BatchNorm, because
    its result does not depend on how a batch is split over processes.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.patch_size = 2 ** len(channels)
        layers: list[nn.Module] = []
        for before, after in zip([3, *channels], channels, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(max(after // 16, 1), after),
                nn.GELU(),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.projection = nn.Conv2d(channels[-1], width, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Embed overlapping neighbourhoods; the sides must be multiples of 2^n px."""
        return self.projection(self.convolutions(images)).flatten(2).transpose(1, 2)
