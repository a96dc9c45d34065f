"""Configs to modules."""

from collections.abc import Sequence

from torch import nn

from mmvit.layers.block import start_as_identity
from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.patch_embedding import PatchEmbedding
from mmvit.models.caption_decoder import CaptionDecoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.models.pixels import CLIP_MEAN, CLIP_STD, PixelNorm
from mmvit.towers.text import TextConfig, TextTransformer
from mmvit.towers.vit import VisionTransformer, ViTConfig


def build_image_tower(config: ViTConfig) -> VisionTransformer:
    """Make a ViT, hybrid where the config names stem channels; raises ValueError for sizes that do not fit."""
    embed: ConvStem | PatchEmbedding
    if config.stem_channels:
        embed = ConvStem(config.stem_channels, config.width, config.stem_residuals)
        if embed.patch_size != config.patch_size:
            raise ValueError(
                f"a stem of {len(config.stem_channels)} convolutions makes patches of {embed.patch_size} px, "
                f"but patch_size is {config.patch_size}"
            )
    else:
        embed = PatchEmbedding(config.patch_size, config.width, bias=config.patch_bias)
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
    tower = VisionTransformer(
        embed,
        (config.image_size // config.patch_size,) * 2,
        config.width,
        config.depth,
        config.num_heads,
        mlp_ratio=config.mlp_ratio,
        activation=config.activation,
        norm_eps=config.norm_eps,
        pool=config.pool,
        pre_norm=config.pre_norm,
    )
    if config.identity_start:
        start_as_identity(tower)
    return tower


def build_text_tower(config: TextConfig) -> TextTransformer:
    """Make the text tower."""
    tower = TextTransformer(
        nn.Embedding(config.vocab_size, config.width),
        config.context_length,
        config.depth,
        config.num_heads,
        end_of_text=config.end_of_text,
        mlp_ratio=config.mlp_ratio,
        activation=config.activation,
        norm_eps=config.norm_eps,
        causal=config.causal,
        pool=config.pool,
    )
    if config.identity_start:
        start_as_identity(tower)
    return tower


def build_dual_encoder(
    config: DualEncoderConfig, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> DualEncoder:
    """Make both towers with fresh weights; `mean` and `std` are the pixel statistics of the preprocessing.

    Raises:
        ValueError: sizes that do not fit, or a caption decoder over a text tower that is not causal.
    """
    image, text = config.image, config.text
    if config.caption_depth and not text.causal:
        raise ValueError("a caption decoder needs a causal text tower: in another each token has seen the next one")
    return DualEncoder(
        build_image_tower(image),
        build_text_tower(text),
        config.embed_dim,
        PixelNorm(mean, std),
        initial_logit_scale=config.initial_logit_scale,
        initial_logit_bias=config.initial_logit_bias,
        image_projection=config.image_projection,
        text_projection_bias=config.text_projection_bias,
        caption_decoder=_caption_decoder(config) if config.caption_depth else None,
        token_head=nn.Linear(image.width, text.vocab_size) if config.token_head else None,
    )


def _caption_decoder(config: DualEncoderConfig) -> CaptionDecoder:
    text = config.text
    return CaptionDecoder(
        text.width,
        config.caption_depth,
        text.num_heads,
        image_width=config.image.width,
        vocab_size=text.vocab_size,
        mlp_ratio=text.mlp_ratio,
        activation=text.activation,
        norm_eps=text.norm_eps,
    )
