"""The dual encoder: an image tower and a text tower with a shared embedding space."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.layers.patch_embedding import Patches, patch_grid
from mmvit.models.caption_decoder import CaptionDecoder
from mmvit.models.config import DualEncoderConfig as DualEncoderConfig
from mmvit.models.pixels import PixelNorm
from mmvit.towers.contract import Tower, TowerOutput


class Embeddings(NamedTuple):
    """Unit-length embeddings of a batch, V texts for each image, and the scale and bias of their logits.

    `caption_logits` are those of the first text, for each of its ids except the first one.
    """

    image: Float[Tensor, "B E"]
    text: Float[Tensor, "B V E"]
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None = None
    caption_logits: Float[Tensor, "B L vocab"] | None = None
    token_logits: Float[Tensor, "B vocab"] | None = None


class DualEncoder(nn.Module):
    """CLIP: two towers, two projections, one learned temperature (Radford et al. 2021, figure 3).

    With a logit bias it is SigLIP (Zhai et al. 2023, section 3.2), with a caption decoder CoCa (Yu et al. 2022); the
    token head predicts the ids of the caption from the pooled image (SuperClass, Huang et al. 2024).
    """

    def __init__(
        self,
        image_tower: Tower,
        text_tower: Tower,
        embed_dim: int,
        pixel_norm: PixelNorm,
        *,
        initial_logit_scale: float = 1 / 0.07,
        initial_logit_bias: float | None = None,
        image_projection: bool = True,
        text_projection_bias: bool = False,
        caption_decoder: CaptionDecoder | None = None,
        token_head: nn.Linear | None = None,
    ):
        super().__init__()
        if not image_projection and image_tower.width != embed_dim:
            what = f"without an image projection embed_dim {embed_dim} must be the image tower's width"
            raise ValueError(f"{what}, {image_tower.width}")
        self.embed_dim = embed_dim
        self.pixel_norm = pixel_norm
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.image_projection: nn.Module = nn.Identity()
        if image_projection:
            self.image_projection = nn.Linear(image_tower.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_tower.width, embed_dim, bias=text_projection_bias)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(initial_logit_scale)))  # a logarithm
        self.logit_bias = None if initial_logit_bias is None else nn.Parameter(torch.tensor(initial_logit_bias))
        self.caption_decoder = caption_decoder
        self.token_head = token_head
        for projection in (self.image_projection, self.text_projection):
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        if text_projection_bias:
            nn.init.zeros_(self.text_projection.bias)

    def encode_image(self, images: Tensor | Patches, normalize: bool = True) -> Float[Tensor, "B E"]:
        """Encode images [B, 3, H, W] or `Patches`, as uint8 pixels or normalised floats; returns float32.

        Any size that the patch size divides is accepted: positions are resampled if it is not the tower's own.
        """
        return self._embed_image(self.image_tower(self.pixel_norm(images), None), normalize)

    def encode_text(self, ids: Int[Tensor, "B L"], normalize: bool = True) -> Float[Tensor, "B E"]:
        """Encode token ids, each row with an end-of-text id; returns float32."""
        return self._embed_text(self.text_tower(ids), normalize)

    def forward(
        self,
        images: Tensor | Patches,
        ids: Int[Tensor, "B V L"],
        keep: Int[Tensor, "B K"] | None = None,
        heads: bool = True,
    ) -> Embeddings:
        """Encode a training batch in one call, as wrappers such as DDP require.

        Args:
            images: as for `encode_image`; or stored embeddings [B, E], which are only normalised to unit length.
            ids: V texts for each image.
            keep: indices of the patches of each image that the tower processes, see `kept_patches`; None for all.
            heads: whether to run the caption decoder and the token head, if there are any.

        Raises:
            ValueError: stored embeddings are passed with `keep`, or to a model with a caption decoder or a token head.
        """
        text = self.text_tower(ids.flatten(0, 1))
        text_embeddings = self._embed_text(text).unflatten(0, ids.shape[:2])
        scale = self.logit_scale.exp().sum()  # a scalar: under FSDP2 it has a dimension, and a view would not work
        bias = None if self.logit_bias is None else self.logit_bias.sum()
        if isinstance(images, Tensor) and images.ndim == 2:
            if keep is not None or self.caption_decoder or self.token_head:
                raise ValueError("stored image embeddings support no patch dropout, caption decoder or token head")
            return Embeddings(F.normalize(images.float(), dim=-1), text_embeddings, scale, bias)
        image = self.image_tower(self.pixel_norm(images), keep)
        captions = tokens = None
        if self.caption_decoder is not None and heads:
            first = text.tokens.unflatten(0, ids.shape[:2])[:, 0, : ids.shape[2] - 1]  # [B, L - 1, D]
            captions = self.caption_decoder(first, image.tokens, image.mask)
        if self.token_head is not None and heads:
            tokens = self.token_head(image.pooled)
        return Embeddings(self._embed_image(image), text_embeddings, scale, bias, captions, tokens)

    def num_patches(self, images: Tensor | Patches) -> int:
        """Return the number of patches of an image; 0 for stored embeddings."""
        if isinstance(images, Patches):
            return images.pixels.shape[1]
        if images.ndim == 2:
            return 0
        rows, columns = patch_grid(images.shape[2], images.shape[3], self.image_tower.stride)
        return rows * columns

    @torch.no_grad()
    def clamp_logit_scale(self, max: float | None = 100.0) -> None:
        """Clamp the scale to [1, max], as CLIP does (section 2.5); None disables it. Call after each update."""
        if max is not None:
            self.logit_scale.clamp_(0, math.log(max))

    def _embed_image(self, output: TowerOutput, normalize: bool = True) -> Float[Tensor, "B E"]:
        features = self.image_projection(output.pooled).float()
        return F.normalize(features, dim=-1) if normalize else features

    def _embed_text(self, output: TowerOutput, normalize: bool = True) -> Float[Tensor, "B E"]:
        features = self.text_projection(output.pooled).float()
        return F.normalize(features, dim=-1) if normalize else features
