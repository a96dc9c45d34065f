"""Each shipped pre-training config loads and has the stated size, learning rates and stages."""

import re
from fnmatch import fnmatch
from functools import partial
from typing import NamedTuple

import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import TextTransformer
from torch import nn

from mmvit.config import PretrainConfig, load_config
from mmvit.data.curriculum import stage_at
from mmvit.data.prompts import configs_folder
from mmvit.layers.patch_dropout import kept_patches
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder
from mmvit.train.optim.schedule import schedule_factor


class Expected(NamedTuple):
    """Parameters, steps, and the learning rate at five of them: start, middle and end of warm-up, half, nine tenths."""

    num_parameters: int
    steps: int
    rates: dict[int, float]


BASE = (0, 977, 1953, 195312, 351562)
EXPECTED = {
    "clip_vit_b32": Expected(
        *(151_277_313, 390_625),
        dict(zip(BASE, (2.5587e-7, 2.5024e-4, 4.9997e-4, 2.5197e-4, 1.2358e-5), strict=True)),
    ),
    "clip_vit_b16": Expected(
        *(149_620_737, 390_625),
        dict(zip(BASE, (2.5587e-7, 2.5024e-4, 4.9997e-4, 2.5197e-4, 1.2358e-5), strict=True)),
    ),
    "clip_vit_l14": Expected(
        *(427_616_513, 390_625),
        dict(zip(BASE, (2.0470e-7, 2.0019e-4, 3.9997e-4, 2.0158e-4, 9.8868e-6), strict=True)),
    ),
    "clip_vit_l14_336": Expected(
        *(427_944_193, 12_207), {0: 8.1586e-8, 122: 1.0035e-5, 244: 1.9989e-5, 6103: 1.0322e-5, 10986: 5.0969e-7}
    ),
    "siglip_vit_b16": Expected(
        *(203_155_970, 390_625), {0: 1.2798e-7, 3906: 5.0003e-4, 7812: 9.9994e-4, 195312: 5.1603e-4, 351562: 2.5473e-5}
    ),
    "lit_vit_b16": Expected(
        *(149_620_737, 60_000), {0: 5.5525e-7, 900: 5.0028e-4, 1800: 1e-3, 30000: 5.2428e-4, 54000: 2.5995e-5}
    ),
    "clipa_vit_l16": Expected(
        *(427_951_617, 80_000), {0: 6.3960e-7, 800: 5.1232e-4, 1600: 1.024e-3, 40000: 5.2841e-4, 72000: 2.6083e-5}
    ),
    "small": Expected(*(13_584_993, 2_000), {0: 3.2787e-5, 30: 1.0164e-3, 60: 2e-3, 1000: 1.1111e-3, 1800: 2.2222e-4}),
    "cc3m_vit_b16": Expected(
        *(149_620_737, 28_320), {0: 1.4104e-6, 354: 5.0071e-4, 708: 1e-3, 14160: 5.2013e-4, 25488: 2.5732e-5}
    ),
}


def load(name: str) -> PretrainConfig:
    return load_config(PretrainConfig, f"pretrain/{name}", ["data.train=shards"])


def build(config: PretrainConfig) -> DualEncoder:
    with torch.device("meta"):
        return build_dual_encoder(config.model)


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_each_shipped_config_is_expected_here():
    assert {path.stem for path in (configs_folder() / "pretrain").glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_size_and_rates(name: str):
    config = load(name)
    config.check()
    expected = EXPECTED[name]
    assert count(build(config)) == expected.num_parameters
    assert config.train.steps == expected.steps
    assert len(expected.rates) == 5
    found = {step: config.optim.lr * schedule_factor(step, expected.steps, config.optim) for step in expected.rates}
    assert found == pytest.approx(expected.rates, rel=1e-4)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_head_says_how_to_run_it_and_what_to_expect(name: str):
    head = (configs_folder() / f"pretrain/{name}.yaml").read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(rf"mmvit pretrain pretrain/{name} '?data\.train=", head)
    assert [word for word in ("# Hardware:", "# Time:", "# Expect:") if word not in head] == []
    if name in ("clip_vit_b32", "clip_vit_b16", "clip_vit_l14", "clip_vit_l14_336", "siglip_vit_b16", "cc3m_vit_b16"):
        assert f"{EXPECTED[name].num_parameters:,} parameters" in head


@pytest.mark.parametrize("name", ["clip_vit_b32", "clip_vit_b16", "clip_vit_l14", "clip_vit_l14_336", "clipa_vit_l16"])
def test_open_clips_model_of_this_shape_has_as_many_parameters(name: str):
    config = load(name).model
    image, text = config.image, config.text
    plain = image.pool == "mean"  # neither a class token nor a norm before the blocks
    vision_cfg = CLIPVisionCfg(
        layers=image.depth,
        width=image.width,
        head_width=image.width // image.num_heads,
        patch_size=image.patch_size,
        image_size=image.image_size,
        no_ln_pre=plain,
    )
    text_cfg = CLIPTextCfg(text.context_length, width=text.width, heads=text.num_heads, layers=text.depth)
    with torch.device("meta"):
        reference = CLIP(config.embed_dim, vision_cfg, text_cfg)
    class_token_and_its_position = 2 * image.width if plain else 0
    assert EXPECTED[name].num_parameters == count(reference) - class_token_and_its_position


def test_siglips_towers_have_as_many_parameters_as_those_of_open_clip():
    """ViT-B-16-SigLIP of open_clip with its vocabulary of 32,000, projection of the text included; scale and bias."""
    with torch.device("meta"):
        image = timm.create_model("vit_base_patch16_siglip_224", num_classes=0)
        norm = partial(nn.LayerNorm, eps=1e-6)
        text = TextTransformer(64, 32_000, 768, 12, 12, output_dim=768, proj_bias=True, norm_layer=norm)
    model = build(load("siglip_vit_b16"))
    assert count(model.image_tower) == count(image) == 92_884_224
    assert count(model.text_tower, model.text_projection) == count(text) == 110_271_744
    assert count(model) == count(image, text) + 2


def test_lit_trains_the_text_side_alone():
    config = load("lit_vit_b16")
    assert config.train.freeze == config.train.init_only  # its texts start from fresh weights
    names = [name for name, _ in build(config).named_parameters()]
    frozen = [name for name in names if any(fnmatch(name, pattern) for pattern in config.train.freeze)]
    assert {name.split(".")[0] for name in frozen} == {"image_tower", "image_projection"}
    assert {name.split(".")[0] for name in set(names) - set(frozen)} == {"text_tower", "text_projection", "logit_scale"}
    assert build(config).state_dict().keys() == build(load("clip_vit_b16")).state_dict().keys()  # what it starts from


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("clipa_vit_l16", {0: (36, 36, 8), 71_999: (36, 36, 8), 72_000: (196, 137, None), 78_400: (441, 265, None)}),
        ("cc3m_vit_b16", {0: (196, 98, None), 25_487: (196, 98, None), 25_488: (196, 196, None)}),
    ],
)
def test_patches_and_tokens_of_each_stage(name: str, stages: dict[int, tuple[int, int, int | None]]):
    """From a step on: the patches of an image, the patches kept, and the longest text."""
    config = load(name)
    model = build(config)
    for step, expected in stages.items():
        stage = stage_at(step, config.train.steps, config.curriculum)
        side = stage.image_size or config.model.image.image_size
        num_patches = model.num_patches(torch.empty(1, 3, side, side, device="meta"))
        kept = kept_patches(torch.tensor([0]), num_patches, stage.patch_dropout, config.seed)
        assert (num_patches, kept.shape[1], stage.text_tokens) == expected
