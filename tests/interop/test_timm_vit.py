"""Copied weights reproduce timm's and transformers' ViT; wrong settings are detected."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvit.interop import timm as timm_names
from mmvit.interop import transformers as transformers_names
from mmvit.interop.imported import Names, rename_weights
from mmvit.models.image_towers import build_image_tower, tower_config
from mmvit.towers.vit import VisionTransformer, ViTConfig

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # on unit rows, and as a share of the largest logit; float32
NUM_CLASSES = 10
SHAPE = {"width": 192, "depth": 12, "num_heads": 3}  # ViT-Ti
CONFIG = ViTConfig(image_size=64, patch_size=16, norm_eps=1e-6, pre_norm=False, patch_bias=True, **SHAPE)
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))

HEAD = "head."


def renamed(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The weights of a tower under our names, without those of a head."""
    return {name: tensor for name, tensor in rename_weights(state, names).items() if not name.startswith(HEAD)}


@pytest.fixture(scope="module")
def timm_vit(randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomized(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=NUM_CLASSES))


@pytest.fixture(scope="module")
def transformers_vit(randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig(
        **shape, image_size=64, patch_size=16, layer_norm_eps=1e-6, num_labels=NUM_CLASSES, hidden_act="gelu"
    )
    return randomized(transformers.ViTForImageClassification(config))


def copied(reference: nn.Module, config: ViTConfig = CONFIG) -> VisionTransformer:
    tower = build_image_tower(config).eval()
    names = timm_names.VIT_NAMES if hasattr(reference, "patch_embed") else transformers_names.VIT_NAMES
    tower.load_state_dict(renamed(reference.state_dict(), names))
    return tower


@torch.no_grad()
def differences(reference: nn.Module, config: ViTConfig = CONFIG, images: Tensor = IMAGES) -> tuple[float, float]:
    """The largest difference of the unit tokens, and of the logits as a share of the largest."""
    tower = copied(reference, config)(images)
    if hasattr(reference, "patch_embed"):
        tokens, head = reference.forward_features(images), reference.head
        logits = reference(images)
    else:
        tokens, head = reference.vit(images).last_hidden_state, reference.classifier
        logits = reference(images).logits
    tokens = F.normalize(tower.tokens, dim=2) - F.normalize(tokens, dim=2)
    share = (head(tower.pooled) - logits).abs().max() / logits.abs().max()
    return tokens.abs().max().item(), share.item()


@pytest.mark.parametrize("name", ["timm_vit", "transformers_vit"])
def test_v8_copied_weights_give_equal_tokens_and_logits(name: str, request: pytest.FixtureRequest):
    assert max(differences(request.getfixturevalue(name))) <= TOLERANCE


WRONG = [{"norm_eps": 1e-12}, {"norm_eps": 1e-5}, {"activation": "gelu_tanh"}, {"activation": "quick_gelu"}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("name", ["timm_vit", "transformers_vit"])
def test_v8_a_wrong_epsilon_or_activation_is_seen(name: str, wrong: dict, request: pytest.FixtureRequest):
    assert min(differences(request.getfixturevalue(name), replace(CONFIG, **wrong))) > TOLERANCE


def test_v8_norms_after_the_branches_are_seen(timm_vit: nn.Module):
    tower = copied(timm_vit)
    for block in tower.blocks:
        block.forward = lambda x, mask, rotary, block=block: block.feed_forward_norm(
            (y := block.attention_norm(x + block.attention(x))) + block.feed_forward(y)
        )
    with torch.no_grad():
        assert (tower(IMAGES).pooled - timm_vit.forward_features(IMAGES)[:, 0]).abs().max() > 0.1


@pytest.mark.parametrize("side", [32, 96])
def test_v13_another_size_is_timms(randomized: Callable[[nn.Module], nn.Module], side: int):
    torch.manual_seed(0)
    reference = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=NUM_CLASSES, dynamic_img_size=True)
    images = torch.randn(2, 3, side, side + 16, generator=torch.Generator().manual_seed(2))
    assert max(differences(randomized(reference), images=images)) <= TOLERANCE


def test_registers_scales_and_normalised_queries_are_timms(randomized: Callable[[nn.Module], nn.Module]):
    torch.manual_seed(0)
    options = {"reg_tokens": 3, "qk_norm": True, "init_values": 0.1, "no_embed_class": True}
    reference = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, depth=4, **options)
    nn.init.normal_(randomized(reference).reg_token, std=0.5)
    config = replace(CONFIG, depth=4, num_registers=3, qk_norm=True, layer_scale=0.1)
    tower = build_image_tower(config).eval()
    weights = renamed(reference.state_dict(), timm_names.VIT_NAMES)
    weights["positions"] = F.pad(weights["positions"], (0, 0, 1, 0))  # none for the class token
    tower.load_state_dict(weights)
    with torch.no_grad():
        expected = reference(IMAGES)
        assert (F.normalize(tower(IMAGES).pooled) - F.normalize(expected)).abs().max() <= TOLERANCE
        tower.registers.zero_()
        assert (F.normalize(tower(IMAGES).pooled) - F.normalize(expected)).abs().max() > TOLERANCE


# Our name; parameters with a head of 1000 classes.
SIZES = {
    "vit_tiny_patch16_224": ("vit_ti16", 5_717_416),
    "vit_small_patch16_224": ("vit_s16", 22_050_664),
    "vit_base_patch32_224": ("vit_b32", 88_224_232),
    "vit_base_patch16_224": ("vit_b16", 86_567_656),
    "vit_large_patch16_224": ("vit_l16", 304_326_632),
    "vit_large_patch14_224": ("vit_l14", 304_203_752),
    "vit_huge_patch14_224": ("vit_h14", 632_045_800),
}


@pytest.mark.parametrize("name", SIZES)
def test_v14_parameters(name: str):
    kind, expected = SIZES[name]
    with torch.device("meta"):
        tower = build_image_tower(tower_config(kind))
        head = nn.Linear(tower.width, 1000)
        reference = timm.create_model(name, num_classes=1000)
    assert sum(p.numel() for module in (tower, head) for p in module.parameters()) == expected
    ours = {name: p.shape.numel() for name, p in tower.state_dict().items()}
    assert ours == {name: p.numel() for name, p in renamed(reference.state_dict(), timm_names.VIT_NAMES).items()}
