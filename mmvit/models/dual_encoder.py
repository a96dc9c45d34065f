"""The dual encoder: an image tower and a text tower with a shared space."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.models.pixels import PixelNorm
from mmvit.towers.contract import Tower
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

# CLIP: the temperature starts at 0.07 and its inverse never exceeds 100 (Radford et al. 2021, section 2.5).
MAX_LOGIT_SCALE = math.log(100)


@dataclass
class DualEncoderConfig:
    """Shape of a dual encoder; the defaults are CLIP ViT-B/32."""

    embed_dim: int = 512
    initial_logit_scale: float = 1 / 0.07  # the factor itself, not its logarithm
    image: ViTConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)


class Embeddings(NamedTuple):
    """Unit-length embeddings of a batch: V texts for each image, and the factor for their cosines."""

    image: Float[Tensor, "B E"]
    text: Float[Tensor, "B V E"]
    logit_scale: Float[Tensor, ""]


class DualEncoder(nn.Module):
    """CLIP: two towers, two bias-free projections, one learned temperature (Radford et al. 2021, figure 3)."""

    def __init__(
        self,
        image_tower: Tower,
        text_tower: Tower,
        embed_dim: int,
        pixel_norm: PixelNorm,
        *,
        initial_logit_scale: float = 1 / 0.07,
    ):
        super().__init__()
        self.pixel_norm = pixel_norm
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.image_projection = nn.Linear(image_tower.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_tower.width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(initial_logit_scale)))  # a logarithm
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Float[Tensor, "B E"]:
        """Encode images [B, 3, H, W]: uint8 pixels, or floats that are normalised already; float32 out."""
        features = self.image_projection(self.image_tower(self.pixel_norm(images)).pooled).float()
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Int[Tensor, "B L"], normalize: bool = True) -> Float[Tensor, "B E"]:
        """Encode token ids, each row with an end-of-text id; float32 out."""
        features = self.text_projection(self.text_tower(ids).pooled).float()
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, ids: Int[Tensor, "B V L"]) -> Embeddings:
        """Encode a training batch in one call, as wrappers such as DDP need it."""
        text = self.encode_text(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        return Embeddings(self.encode_image(images), text, self.logit_scale.exp())

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the factor within [1, 100]; call after each optimiser step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
