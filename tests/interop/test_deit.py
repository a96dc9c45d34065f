"""Copied weights reproduce timm's and transformers' distilled DeiT; swapped tokens are detected."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvit.interop import timm as timm_names
from mmvit.interop import transformers as transformers_names
from mmvit.interop.imported import rename_weights
from mmvit.models.image_towers import build_image_tower
from mmvit.towers.contract import TowerOutput
from mmvit.towers.vit import ViTConfig

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # on unit rows, and as a share of the largest logit; float32
CONFIG = ViTConfig(
    *("vit", 64, 16, 192, 12, 3), norm_eps=1e-6, pre_norm=False, patch_bias=True, distilled=True
)  # DeiT-Ti on small images
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))

HEADS = ("head.", "distillation_head.")


def renamed(reference: nn.Module) -> dict[str, Tensor]:
    """The weights of the tower under our names."""
    names = timm_names.VIT_NAMES if hasattr(reference, "head_dist") else transformers_names.VIT_NAMES
    weights = rename_weights(reference.state_dict(), names)
    return {name: tensor for name, tensor in weights.items() if not name.startswith(HEADS)}


@pytest.fixture(scope="module", params=["timm", "transformers"])
def reference(request: pytest.FixtureRequest, randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A small distilled DeiT with every number drawn at random."""
    torch.manual_seed(0)
    if request.param == "timm":
        model: nn.Module = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=10)
    else:
        shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
        config = transformers.DeiTConfig(**shape, image_size=64, patch_size=16, layer_norm_eps=1e-6, num_labels=10)
        model = transformers.DeiTForImageClassificationWithTeacher(config)
    return randomized(model)


@torch.no_grad()
def differences(reference: nn.Module, found: TowerOutput) -> tuple[float, float]:
    """The largest difference of the two unit tokens, and of the mean of two logits as a share of the largest."""
    if hasattr(reference, "head_dist"):
        tokens, logits = reference.forward_features(IMAGES), reference(IMAGES)
        heads = reference.head, reference.head_dist
    else:
        tokens, logits = reference.deit(IMAGES).last_hidden_state, reference(IMAGES).logits
        heads = reference.cls_classifier, reference.distillation_classifier
    ours = torch.stack([found.pooled, found.distilled], dim=1)
    tokens = (F.normalize(ours, dim=2) - F.normalize(tokens[:, :2], dim=2)).abs().max()
    share = ((heads[0](found.pooled) + heads[1](found.distilled)) / 2 - logits).abs().max() / logits.abs().max()
    return tokens.item(), share.item()


@torch.no_grad()
def encoded(reference: nn.Module, weights: dict[str, Tensor], config: ViTConfig = CONFIG) -> TowerOutput:
    tower = build_image_tower(config).eval()
    tower.load_state_dict(weights)
    return tower(IMAGES)


def test_d1_copied_weights_give_equal_tokens_and_logits(reference: nn.Module):
    weights = renamed(reference)
    assert weights["positions"].shape == (16 + 2, 192)
    assert max(differences(reference, encoded(reference, weights))) <= TOLERANCE


WRONG = [{"norm_eps": 1e-12}, {"norm_eps": 1e-5}, {"activation": "gelu_tanh"}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_d1_a_wrong_epsilon_or_activation_is_seen(reference: nn.Module, wrong: dict):
    found = encoded(reference, renamed(reference), replace(CONFIG, **wrong))
    assert min(differences(reference, found)) > TOLERANCE


@pytest.mark.parametrize("part", ["tokens", "positions", "outputs"])
def test_d1_swapped_tokens_are_seen(reference: nn.Module, part: str):
    weights = renamed(reference)
    if part == "tokens":
        first, second = weights["class_token"], weights["distillation_token"]
        weights |= {"class_token": second, "distillation_token": first}
    elif part == "positions":
        weights["positions"] = torch.cat([weights["positions"][:2].flip(0), weights["positions"][2:]])
    found = encoded(reference, weights)
    if part == "outputs":
        found = found._replace(pooled=found.distilled, distilled=found.pooled)
    assert min(differences(reference, found)) > TOLERANCE


# Width and heads; parameters with two heads of 1000 classes.
SIZES = {"tiny": (192, 3, 5_910_800), "small": (384, 6, 22_436_432), "base": (768, 12, 87_338_192)}


@pytest.mark.parametrize("size", SIZES)
def test_d1_parameters(size: str):
    width, num_heads, expected = SIZES[size]
    config = replace(CONFIG, image_size=224, width=width, num_heads=num_heads)
    with torch.device("meta"):
        modules = build_image_tower(config), nn.Linear(width, 1000), nn.Linear(width, 1000)
        reference = timm.create_model(f"deit_{size}_distilled_patch16_224", num_classes=1000)
    assert sum(p.numel() for module in modules for p in module.parameters()) == expected
    assert {n: p.numel() for n, p in modules[0].state_dict().items()} == {
        n: p.numel() for n, p in renamed(reference).items()
    }
