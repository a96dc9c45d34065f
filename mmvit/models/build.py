"""Builds models from configs."""

from collections.abc import Sequence

from torch import nn

from mmvit.layers.block import start_as_identity
from mmvit.models.caption_decoder import CaptionDecoder
from mmvit.models.classifier import ClassifierConfig, HiddenHead, ImageClassifier, zero_head
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.models.image_towers import build_image_tower
from mmvit.models.pixels import CLIP_MEAN, CLIP_STD, PixelNorm
from mmvit.towers.contract import Tower
from mmvit.towers.text import TextConfig, TextTransformer
from mmvit.towers.vit import ViTConfig


def build_text_tower(config: TextConfig) -> TextTransformer:
    """Build the text tower."""
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
    """Build both towers, randomly initialised; `mean` and `std` are the pixel statistics of the preprocessing.

    Raises:
        ValueError: sizes do not fit, or a caption decoder has a text tower that is not causal.
    """
    tower, text = build_image_tower(config.image), config.text
    if config.caption_depth and not text.causal:
        raise ValueError("a caption decoder needs a causal text tower: otherwise each token attends to the next one")
    return DualEncoder(
        tower,
        build_text_tower(text),
        config.embed_dim,
        PixelNorm(mean, std),
        initial_logit_scale=config.initial_logit_scale,
        initial_logit_bias=config.initial_logit_bias,
        image_projection=config.image_projection,
        text_projection_bias=config.text_projection_bias,
        caption_decoder=_caption_decoder(config, tower.width) if config.caption_depth else None,
        token_head=nn.Linear(tower.width, text.vocab_size) if config.token_head else None,
    )


def build_classifier(
    config: ClassifierConfig,
    class_names: Sequence[str],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> ImageClassifier:
    """Build a randomly initialised tower and a head of zeros; raises ValueError if sizes do not fit."""
    tower: Tower = build_image_tower(config.image)
    projection: nn.Module | None = None
    if config.embed_dim is not None and not config.image_projection:
        if config.embed_dim != tower.width:
            raise ValueError(
                f"embed_dim {config.embed_dim} needs an image projection: the tower has width {tower.width}"
            )
        projection = nn.Identity()
    elif config.embed_dim is not None:
        projection = nn.Linear(tower.width, config.embed_dim, bias=False)
        nn.init.normal_(projection.weight, std=tower.width**-0.5)
    width = config.embed_dim or tower.width
    distilled = isinstance(config.image, ViTConfig) and config.image.distilled
    return ImageClassifier(
        tower,
        PixelNorm(mean, std),
        HiddenHead(width, len(class_names)) if config.head == "hidden" else zero_head(width, len(class_names)),
        class_names,
        image_projection=projection,
        distillation_head=zero_head(tower.width, len(class_names)) if distilled else None,
    )


def _caption_decoder(config: DualEncoderConfig, image_width: int) -> CaptionDecoder:
    text = config.text
    return CaptionDecoder(
        text.width,
        config.caption_depth,
        text.num_heads,
        image_width=image_width,
        vocab_size=text.vocab_size,
        mlp_ratio=text.mlp_ratio,
        activation=text.activation,
        norm_eps=text.norm_eps,
    )
