"""The config keys of models, and the image towers by name. Nothing here imports torch."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from data_tools.core.errors import did_you_mean
from mmvit.keys import key
from mmvit.towers.config import CvTConfig, ResNetConfig, SwinConfig, TextConfig, TimmConfig, TowerConfig, ViTConfig

# The pixel statistics of OpenAI's CLIP (its published preprocessing).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TIMM = "timm:"  # prefix of the name of a timm model


def _vit(patch_size: int, width: int, depth: int, num_heads: int, **more: Any) -> ViTConfig:
    """Return the config of a ViT as in Dosovitskiy et al. 2021 and DeiT (Touvron et al. 2021)."""
    shape: dict[str, Any] = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": num_heads}
    return ViTConfig(**shape, pre_norm=False, patch_bias=True, norm_eps=1e-6, init="vit", **more)


# Default config of each name; a run can override any value. Sizes: ViT, table 1; DeiT, table 1; Swin,
# section 3.3; CvT, table 2. "vit", "swin" and "cvt" default to CLIP ViT-B/32, Swin-T and CvT-13, for custom sizes.
TOWERS: dict[str, TowerConfig] = {
    "vit": ViTConfig(),
    "vit_ti16": _vit(16, 192, 12, 3),
    "vit_s16": _vit(16, 384, 12, 6),
    "vit_b32": _vit(32, 768, 12, 12),
    "vit_b16": _vit(16, 768, 12, 12),
    "vit_l16": _vit(16, 1024, 24, 16),
    "vit_l14": _vit(14, 1024, 24, 16),
    "vit_h14": _vit(14, 1280, 32, 16),
    "vit_b16_r50": _vit(16, 768, 12, 12, stem_stages=[3, 4, 9]),
    "deit_ti16_distilled": _vit(16, 192, 12, 3, distilled=True),
    "deit_s16_distilled": _vit(16, 384, 12, 6, distilled=True),
    "deit_b16_distilled": _vit(16, 768, 12, 12, distilled=True),
    "swin": SwinConfig(),
    "swin_t": SwinConfig(),
    "swin_s": SwinConfig(depths=[2, 2, 18, 2]),
    "swin_b": SwinConfig(width=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
    "swin_l": SwinConfig(width=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]),
    "cvt": CvTConfig(),
    "cvt_13": CvTConfig(),
    "cvt_21": CvTConfig(depths=[1, 4, 16]),
    "cvt_w24": CvTConfig(image_size=384, widths=[192, 768, 1024], depths=[2, 2, 20], num_heads=[3, 12, 16]),
    "resnet": ResNetConfig(),
    "rn50": ResNetConfig(),
}


def tower_config(kind: str) -> TowerConfig:
    """Return the default config of an image tower by its name.

    Raises:
        ValueError: the name is neither in `TOWERS` nor timm:NAME.
    """
    if kind.startswith(TIMM):
        return TimmConfig(kind=kind)
    if kind not in TOWERS:
        hint = did_you_mean(kind, TOWERS) or f"choose from {', '.join(TOWERS)} or timm:NAME"
        raise ValueError(f"there is no image tower {kind!r}; {hint}")
    return dataclasses.replace(copy.deepcopy(TOWERS[kind]), kind=kind)


@dataclass
class DualEncoderConfig:
    """Architecture of a dual encoder; the defaults are those of CLIP ViT-B/32."""

    embed_dim: int = key(512, "width of the shared embedding space", ge=1, le=2**16)
    initial_logit_scale: float = key(
        1 / 0.07, "initial logit scale: the factor itself, not its logarithm", ge=1e-3, le=10**4
    )
    initial_logit_bias: float | None = key(
        None, "initial logit bias of the sigmoid loss, -10 in SigLIP; null: no bias", ge=-1000, le=1000
    )
    image_projection: bool = key(True, "false: the image tower's output, of width embed_dim, is the embedding")
    text_projection_bias: bool = key(False, "bias in the text projection")
    caption_depth: int = key(0, "blocks of the caption decoder (CoCa); 0: no decoder", ge=0, le=1024)
    token_head: bool = key(False, "linear head from the pooled image to the vocabulary (SuperClass)")
    image: TowerConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass
class ClassifierConfig:
    """Architecture of an image classifier, without its classes."""

    image: TowerConfig = field(default_factory=ViTConfig)
    head: Literal["linear", "hidden"] = key("linear", "classification head; hidden: with a tanh layer, as in ViT")
    embed_dim: int | None = key(
        None,
        "classify unit-length embeddings of this width, as a contrastive model does; null: the tower's output",
        ge=1,
        le=2**16,
    )
    image_projection: bool = key(True, "false: the tower's output, of width embed_dim, is the embedding")
