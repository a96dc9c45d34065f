"""Masked patch prediction: self-supervised pretraining of an image tower."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmvit.layers.patch_corruption import Corruption, corrupt
from mmvit.models.pixels import PixelNorm
from mmvit.towers.vit import VisionTransformer


class ColourLogits(NamedTuple):
    """Logits of the mean colour of each patch."""

    logits: Float[Tensor, "B N C"]


class MaskedPatchModel(nn.Module):
    """Predicts the mean colours of corrupted patches (Dosovitskiy et al. 2021, appendix B.1.2)."""

    def __init__(self, image_tower: VisionTransformer, pixel_norm: PixelNorm, num_colours: int):
        super().__init__()
        self.image_tower = image_tower
        self.pixel_norm = pixel_norm
        self.mask_embedding = nn.Parameter(torch.empty(image_tower.width))
        self.colour_head = nn.Linear(image_tower.width, num_colours)
        nn.init.normal_(self.mask_embedding, std=0.02)

    def forward(self, images: Tensor, corruption: Corruption | None = None) -> ColourLogits:
        """Return the colour logits of all patches of images [B, 3, H, W], some of which may be corrupted."""

        def change(tokens: Tensor) -> Tensor:
            return tokens if corruption is None else corrupt(tokens, corruption, self.mask_embedding)

        output = self.image_tower(self.pixel_norm(images), change=change)
        return ColourLogits(self.colour_head(output.tokens[:, self.image_tower.num_prefix :]))
