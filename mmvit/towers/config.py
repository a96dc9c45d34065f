"""The config keys of the towers. Nothing here imports torch: a config is validated before that."""

import math
from dataclasses import dataclass
from typing import Literal

from mmvit.keys import key
from mmvit.layers.activation import Activation
from mmvit.towers.timm_models import timm_sizes

Pool = Literal["class", "mean", "attention"]
Position = Literal["learned", "learned_2d", "one_hot", "sinusoidal", "sincos_2d", "relative", "rotary", "none"]


@dataclass
class TowerConfig:
    """Fields of all image towers; `kind` is a name in TOWERS, which sets the defaults of the other fields."""

    kind: str = key("", "name of the image tower; it sets the defaults of the other keys")
    image_size: int = key(224, "side of an image, px", ge=1, le=2**14)

    @property
    def stride(self) -> int:
        """Return the number of px of which an image's height and width must be multiples."""
        raise NotImplementedError


@dataclass
class ViTConfig(TowerConfig):
    """Architecture of a ViT; the defaults are those of CLIP ViT-B/32."""

    kind: str = key("vit", "name of the image tower; it sets the defaults of the other keys")
    patch_size: int = key(32, "side of a patch, px", ge=1, le=2**10)
    width: int = key(768, "width of the tokens", ge=1, le=2**16)
    depth: int = key(12, "number of blocks", ge=1, le=1024)
    num_heads: int = key(12, "attention heads of each block", ge=1, le=1024)
    mlp_ratio: float = key(4.0, "ratio of the feed-forward network's hidden width to width", gt=0, le=100)
    activation: Activation = key("gelu", "activation of the feed-forward network")
    norm_eps: float = key(1e-5, "epsilon of LayerNorm", ge=1e-12, le=1)
    pool: Pool = key("class", "how tokens become one vector; only class adds a class token")
    pre_norm: bool = key(True, "LayerNorm before the first block, as in CLIP")
    patch_bias: bool = key(False, "bias in the patch embedding")
    init: Literal["clip", "vit"] = key(
        "clip", "initial weights; clip: PyTorch's linear maps, tables N(0, 1/width); vit: N(0, 0.02^2), biases zero"
    )
    identity_start: bool = key(False, "start with the output maps of the blocks at zero")
    stem_channels: list[int] = key(
        [], "hybrid ViT: channels of each stride-2 convolution of the stem", ge=1, le=2**14, max_length=10
    )
    stem_residuals: list[int] = key(
        [], "residual blocks after each convolution of the stem", ge=0, le=100, max_length=10
    )
    stem_stages: list[int] = key(
        [], "hybrid ViT: residual units of each stage of a ResNet stem", ge=1, le=100, max_length=10
    )
    position: Position = key("learned", "position encoding")
    distilled: bool = key(False, "add a distillation token, as in DeiT; needs pool class")
    num_registers: int = key(0, "number of register tokens", ge=0, le=2**16)
    qk_norm: bool = key(False, "LayerNorm on the queries and keys of each head")
    layer_scale: float | None = key(
        None, "initial factor of each channel of a residual branch; null: no LayerScale", gt=0, le=100
    )
    drop_path: float = key(
        0.0, "stochastic depth rate of the last block, rising evenly from 0 in the first", ge=0, lt=1
    )

    @property
    def stride(self) -> int:
        """Return the patch size."""
        return self.patch_size


@dataclass
class SwinConfig(TowerConfig):
    """Architecture of a Swin Transformer; the defaults are those of Swin-T."""

    kind: str = key("swin", "name of the image tower; it sets the defaults of the other keys")
    patch_size: int = key(4, "side of a patch, px", ge=1, le=2**10)
    width: int = key(96, "width of the first stage; each further stage doubles it", ge=1, le=2**14)
    depths: list[int] = key([2, 2, 6, 2], "blocks of each stage", ge=1, le=1024, min_length=1, max_length=8)
    num_heads: list[int] = key(
        [3, 6, 12, 24], "attention heads of each stage", ge=1, le=1024, min_length=1, max_length=8
    )
    window_size: int = key(7, "side of a window, in patches", ge=1, le=2**10)
    mlp_ratio: float = key(4.0, "ratio of the feed-forward network's hidden width to width", gt=0, le=100)
    activation: Activation = key("gelu", "activation of the feed-forward network")
    norm_eps: float = key(1e-5, "epsilon of LayerNorm", ge=1e-12, le=1)
    drop_path: float = key(
        0.0, "stochastic depth rate of the last block, rising from 0; paper: T 0.2, S 0.3, B 0.5", ge=0, lt=1
    )

    @property
    def stride(self) -> int:
        """Return the stride of the last feature map, in px."""
        return self.patch_size * 2 ** (len(self.depths) - 1)


@dataclass
class CvTConfig(TowerConfig):
    """Architecture of a CvT, one number per stage in each list; the defaults are those of CvT-13."""

    kind: str = key("cvt", "name of the image tower; it sets the defaults of the other keys")
    widths: list[int] = key([64, 192, 384], "width of each stage", ge=1, le=2**16, min_length=1, max_length=8)
    depths: list[int] = key([1, 2, 10], "blocks of each stage", ge=1, le=1024, min_length=1, max_length=8)
    num_heads: list[int] = key([1, 3, 6], "attention heads of each stage", ge=1, le=1024, min_length=1, max_length=8)
    patch_sizes: list[int] = key(
        [7, 3, 3],
        "patch side of each stage: px of the image, then cells of the map",
        ge=1,
        le=2**10,
        min_length=1,
        max_length=8,
    )
    strides: list[int] = key(
        [4, 2, 2], "distance between patches of each stage; patches overlap", ge=1, le=2**10, min_length=1, max_length=8
    )
    mlp_ratio: float = key(4.0, "ratio of the feed-forward network's hidden width to width", gt=0, le=100)
    # As in the paper and transformers; the released weights were trained with quick_gelu.
    activation: Activation = key("gelu", "activation of the feed-forward network")
    norm_eps: float = key(1e-5, "epsilon of LayerNorm", ge=1e-12, le=1)
    qkv_bias: bool = key(True, "biases in the query, key and value maps")
    drop_path: float = key(
        0.0, "stochastic depth rate of the last block, rising from 0 within the last stage; paper: 0.1", ge=0, lt=1
    )

    @property
    def stride(self) -> int:
        """Return the product of the strides."""
        return math.prod(self.strides)


@dataclass
class ResNetConfig(TowerConfig):
    """Architecture of a modified ResNet; the defaults are those of CLIP RN50."""

    kind: str = key("resnet", "name of the image tower; it sets the defaults of the other keys")
    # The output is CLIP's embedding: leave out the image projection to have the same.
    width: int = key(1024, "width of the output", ge=1, le=2**16)
    depths: list[int] = key([3, 4, 6, 3], "bottlenecks of each stage", ge=1, le=1024, min_length=1, max_length=8)
    stem_width: int = key(
        64, "channels after the stem; stage i (from 0) ends with 4 * 2^i times as many", ge=1, le=2**14
    )
    num_heads: int = key(32, "heads of the attention pooling", ge=1, le=1024)

    @property
    def stride(self) -> int:
        """Return 4 px for the stem, doubled by each stage after the first."""
        return 2 ** (len(self.depths) + 1)


@dataclass
class TimmConfig(TowerConfig):
    """A timm model; `kind` is "timm:" and its name in timm."""

    kind: str = key("timm:resnet18", "timm:NAME, a model of timm")

    @property
    def name(self) -> str:
        """Return the model's name in timm."""
        return self.kind.removeprefix("timm:")

    @property
    def stride(self) -> int:
        """Return the stride of tokens or of the last feature map, px; raises ValueError for a name not in timm."""
        return timm_sizes(self.name)[0]

    @property
    def takes_any_size(self) -> bool:
        """Return whether images may have sides that are not multiples of the stride, as for convolutional models."""
        return not timm_sizes(self.name)[1]


@dataclass
class TextConfig:
    """Architecture of a text tower; the defaults are those of CLIP ViT-B."""

    vocab_size: int = key(49408, "number of token ids", ge=1, le=2**24)
    context_length: int = key(77, "maximum text length in tokens, start and end included", ge=3, le=2**16)
    end_of_text: int = key(49407, "token id that ends a text", ge=0, le=2**24)
    width: int = key(512, "width of the tokens", ge=1, le=2**16)
    depth: int = key(12, "number of blocks", ge=1, le=1024)
    num_heads: int = key(8, "attention heads of each block", ge=1, le=1024)
    mlp_ratio: float = key(4.0, "ratio of the feed-forward network's hidden width to width", gt=0, le=100)
    activation: Activation = key("gelu", "activation of the feed-forward network")
    norm_eps: float = key(1e-5, "epsilon of LayerNorm", ge=1e-12, le=1)
    causal: bool = key(True, "causal attention; false: every token sees every other token, as in SigLIP")
    pool: Literal["end_of_text", "last"] = key("end_of_text", "token that becomes the text's vector")
    identity_start: bool = key(False, "start with the output maps of the blocks at zero")
