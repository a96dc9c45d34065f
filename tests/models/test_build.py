"""Configs build models with exact parameter counts; sizes that do not fit raise errors."""

import inspect

import pytest
import torch
from torch import nn

from mmvit.layers.conv_stem import ConvStem
from mmvit.models.build import build_dual_encoder, build_image_tower, build_text_tower
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.text import TextConfig, TextTransformer
from mmvit.towers.vit import VisionTransformer, ViTConfig

LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "patch_size": 14}
HUGE = {"width": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}
# Embedding width, image tower, text tower; parameters of the image side and of the text side, projections included.
CLIPS = {
    "ViT-B/32": (512, ViTConfig(), TextConfig(), 87_849_216, 63_428_096),
    "ViT-B/16": (512, ViTConfig(patch_size=16), TextConfig(), 86_192_640, 63_428_096),
    "ViT-L/14": (768, ViTConfig(**LARGE), TextConfig(width=768, num_heads=12), 303_966_208, 123_650_304),
    "ViT-L/14@336": (
        *(768, ViTConfig(**LARGE, image_size=336), TextConfig(width=768, num_heads=12)),
        *(304_293_888, 123_650_304),
    ),
    "ViT-H/14": (
        *(1024, ViTConfig(**HUGE), TextConfig(width=1024, num_heads=16, depth=24)),
        *(632_076_800, 354_032_640),
    ),
}
TOTALS = {
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336": 427_944_193,
    "ViT-H/14": 986_109_441,
}


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("name", CLIPS)
def test_parameters_of_clip(name: str):
    embed_dim, image, text, num_image, num_text = CLIPS[name]
    with torch.device("meta"):
        model = build_dual_encoder(DualEncoderConfig(embed_dim, image=image, text=text))
    assert count(model.image_tower, model.image_projection) == num_image
    assert count(model.text_tower, model.text_projection) == num_text
    assert count(model) == TOTALS[name] == num_image + num_text + 1


@pytest.mark.parametrize("tower", [VisionTransformer, TextTransformer])
def test_defaults_stand_in_the_configs_alone(tower: type[nn.Module]):
    parameters = inspect.signature(tower).parameters.values()
    assert [p.name for p in parameters if p.default is not p.empty] == []


def test_a_hybrid_tower_is_built_from_its_stem():
    config = ViTConfig(image_size=32, patch_size=8, stem_channels=[4, 8, 16], width=32, depth=1, num_heads=2)
    tower = build_image_tower(config)
    assert isinstance(tower.embed, ConvStem)
    assert tower(torch.zeros(1, 3, 32, 32)).pooled.shape == (1, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ViTConfig(image_size=32, patch_size=16, stem_channels=[4, 8, 16]), "patches of 8 px, but patch_size is 16"),
        (ViTConfig(image_size=30, patch_size=8), "image_size 30 is not a multiple of patch_size 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: ViTConfig, message: str):
    with pytest.raises(ValueError, match=message):
        build_image_tower(config)


@pytest.mark.parametrize("identity_start", [True, False])
def test_blocks_start_as_the_identity_only_where_asked(identity_start: bool):
    image = build_image_tower(
        ViTConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, identity_start=identity_start)
    )
    text = build_text_tower(TextConfig(vocab_size=20, width=16, depth=2, num_heads=2, identity_start=identity_start))
    x = torch.randn(2, 4, 16)
    for block in (*image.blocks, *text.blocks):
        for part in (block, lambda tokens, block=block: tokens + block.feed_forward(tokens)):
            assert torch.equal(part(x), x) == identity_start


def test_further_heads_leave_the_drawn_weights_of_the_towers_alone():
    """A run with a captioning loss starts from the same towers as one without."""
    image = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2)
    text = TextConfig(vocab_size=20, width=16, depth=1, num_heads=2)
    states = []
    for extra in ({}, {"caption_depth": 1, "token_head": True, "initial_logit_bias": -10.0}):
        torch.manual_seed(0)
        states.append(build_dual_encoder(DualEncoderConfig(16, image=image, text=text, **extra)).state_dict())
    plain, extended = states
    assert [name for name in plain if "_tower." in name and not torch.equal(plain[name], extended[name])] == []
    new = {name.split(".")[0] for name in extended.keys() - plain.keys()}
    assert new == {"caption_decoder", "token_head", "logit_bias"}
