"""Image towers by name: exact sizes, one contract for all, helpful errors."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.models.image_towers import TOWERS, build_image_tower, tower_config
from mmvit.towers.contract import TowerConfig
from mmvit.towers.text import TextConfig

# Parameters with a head of 1000 classes, as the papers' references have them.
SIZES = {
    "vit_ti16": 5_717_416,
    "vit_s16": 22_050_664,
    "vit_b32": 88_224_232,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    "vit_l14": 304_203_752,
    "vit_h14": 632_045_800,
    "vit_b16_r50": 97_890_112 + 769_000,
    "deit_ti16_distilled": 5_910_800,
    "deit_s16_distilled": 22_436_432,
    "deit_b16_distilled": 87_338_192,
    "swin_t": 28_288_354,
    "swin_s": 49_606_258,
    "swin_b": 87_768_224,
    "swin_l": 196_532_476,
    "cvt_13": 19_997_480,
    "cvt_21": 31_622_696,
    "cvt_w24": 277_196_392,
}
SMALL: dict[str, dict] = {
    "vit": {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 2},
    "vit_b16_r50": {"width": 32, "depth": 1, "num_heads": 2, "stem_stages": [1, 1, 1]},
    "deit_ti16_distilled": {"width": 32, "depth": 2, "num_heads": 2},
    "swin": {"patch_size": 2, "width": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "cvt": {"widths": [16, 32, 32], "depths": [1, 1, 1], "num_heads": [1, 2, 2]},
    "resnet": {"depths": [1, 1, 1, 1], "stem_width": 16, "width": 32, "num_heads": 4},
    "timm:resnet18": {},
}


def small(kind: str) -> TowerConfig:
    return dataclasses.replace(tower_config(kind), image_size=64, **SMALL[kind])


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_are_the_published_ones(kind: str):
    with torch.device("meta"):
        model = build_classifier(ClassifierConfig(tower_config(kind)), [""] * 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[kind]


def test_clip_rn50_has_its_published_size():
    text = TextConfig(width=512, num_heads=8, depth=12)
    with torch.device("meta"):
        config = DualEncoderConfig(embed_dim=1024, image=tower_config("rn50"), text=text, image_projection=False)
        model = build_dual_encoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 102_007_137


@pytest.mark.parametrize(
    ("kind", "count"), [("vit_b16", 85_798_656), ("vit_h14", 630_764_800), ("vit_b16_r50", 97_890_112)]
)
def test_sizes_without_a_head(kind: str, count: int):
    with torch.device("meta"):
        tower = build_image_tower(tower_config(kind))
    assert sum(parameter.numel() for parameter in tower.parameters()) == count


@pytest.mark.parametrize(
    ("kind", "size", "billions"),
    [
        ("vit_ti16", 224, 1.25),
        ("vit_s16", 224, 4.60),
        ("vit_b32", 224, 4.41),
        ("vit_b16", 224, 17.56),
        ("vit_b16", 384, 55.48),
        ("vit_l16", 224, 61.55),
        ("vit_l14", 224, 81.01),
        ("vit_h14", 224, 167.29),
        ("cvt_13", 224, 4.57),
        ("cvt_21", 224, 7.18),
    ],
)
def test_multiply_accumulates_are_the_published_ones(kind: str, size: int, billions: float):
    with torch.device("meta"):
        config = dataclasses.replace(tower_config(kind), image_size=size)
        model = build_classifier(ClassifierConfig(config), [""] * 1000).eval()
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.01)


def test_vit_starts_as_its_released_code_does():
    torch.manual_seed(0)
    tower = build_image_tower(dataclasses.replace(tower_config("vit_ti16"), depth=2))
    for name, parameter in tower.named_parameters():
        if name.startswith("blocks.") and name.endswith("weight") and parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
            assert parameter.abs().max() <= 2
        elif name.startswith("blocks.") and name.endswith("bias"):
            assert not parameter.any()
    assert tower.positions.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", SMALL)
def test_every_tower_keeps_the_contract(kind: str):
    """One vector per image, tokens of the same width, gradients, and use in both kinds of model."""
    torch.manual_seed(0)
    tower = build_image_tower(small(kind)).train()
    images = torch.randn(2, 3, 64, 64)
    output = tower(images, None)
    assert output.pooled.shape == (2, tower.width)
    assert output.tokens.ndim == 3
    assert output.tokens.shape[::2] == (2, tower.width)
    assert tower.stride == small(kind).stride
    assert math.gcd(64, tower.stride) == tower.stride
    output.pooled.square().sum().backward()
    tower.eval()
    alone, both = tower(images[:1], None).pooled, tower(images, None).pooled
    torch.testing.assert_close(alone, both[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
def test_every_tower_sees_for_both_kinds_of_model(kind: str):
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    classifier = build_classifier(ClassifierConfig(small(kind)), ["a", "b", "c"]).eval()
    assert torch.equal(classifier(images).logits, torch.zeros(2, 3))  # heads start at zero
    text = TextConfig(vocab_size=50, context_length=8, end_of_text=49, width=16, depth=1, num_heads=2)
    dual = build_dual_encoder(DualEncoderConfig(embed_dim=8, image=small(kind), text=text)).eval()
    assert torch.allclose(dual.encode_image(images).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind not in ("vit", "deit_ti16_distilled", "vit_b16_r50")])
def test_towers_for_whole_images_refuse_to_drop_patches(kind: str):
    tower = build_image_tower(small(kind)).eval()
    with pytest.raises(ValueError, match="needs whole images"):
        tower(torch.randn(2, 3, 64, 64), torch.zeros(2, 1, dtype=torch.long))


def test_names_lead_to_their_own_copies():
    config = tower_config("swin_t")
    config.depths.append(5)  # type: ignore[attr-defined]
    assert tower_config("swin_t") == dataclasses.replace(TOWERS["swin_t"], kind="swin_t")
    with pytest.raises(ValueError, match=r"no image tower 'swint'; did you mean 'swin_t'"):
        tower_config("swint")


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("vit_b16", 100, "image_size 100 is not a multiple of patch_size 16"),
        ("swin_t", 100, "image_size 100 is not a multiple of 32 px"),
        ("swin_t", 96, "less than window_size 7; use sides of 224 px or more"),
        ("cvt_13", 100, "image_size 100 is not a multiple of 16 px"),
        ("rn50", 100, "image_size 100 is not a multiple of 32 px, the stride of rn50; 96 or 128 px fit"),
        ("timm:vit_tiny_patch16_224", 50, "image_size 50 is not a multiple of 16 px"),
        ("timm:resnet18", 10, "image_size 10 is not a multiple of 32 px, the stride of timm:resnet18; 32 px fit"),
    ],
)
def test_sizes_that_do_not_fit_raise(kind: str, size: int, message: str):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_image_tower(dataclasses.replace(tower_config(kind), image_size=size))
