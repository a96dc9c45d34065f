"""The ViT: class token after the projection, positions that matter, one vector an image."""

import pytest
import torch

from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.patch_embedding import PatchEmbedding, patchify, unpatchify
from mmvit.towers.vit import VisionTransformer

SETTINGS = {"mlp_ratio": 4.0, "activation": "gelu", "norm_eps": 1e-5}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tower(pool: str = "class", pre_norm: bool = True) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(PatchEmbedding(4, 32), 16, 32, 2, 4, pool=pool, pre_norm=pre_norm, **SETTINGS).eval()


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_pooled_and_tokens(pool: str):
    output = tower(pool)(IMAGES)
    assert output.tokens.shape == (2, 16 + (pool == "class"), 32)
    expected = output.tokens[:, 0] if pool == "class" else output.tokens.mean(dim=1)
    assert torch.equal(output.pooled, expected)


def test_permuted_patches_change_the_result_through_the_positions_alone():
    model = tower()
    patches = patchify(IMAGES, 4)
    permuted = unpatchify(patches[:, torch.randperm(16)], 4, (4, 4))
    assert (model(IMAGES).pooled - model(permuted).pooled).abs().max() > 1e-3
    torch.nn.init.zeros_(model.positions)
    assert (model(IMAGES).pooled - model(permuted).pooled).abs().max() < 1e-5


@pytest.mark.parametrize("pre_norm", [False, True])
def test_every_parameter_gets_a_gradient(pre_norm: bool):
    model = tower(pre_norm=pre_norm)
    model(IMAGES).pooled.square().sum().backward()
    # Adding one number to all keys does not change a softmax: their bias gets rounding noise.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_stem_changes_the_stems_names_only():
    names = set(tower().state_dict())
    hybrid = VisionTransformer(ConvStem([8, 16], 32), 16, 32, 2, 4, pool="class", pre_norm=True, **SETTINGS)
    assert {name for name in names ^ set(hybrid.state_dict()) if not name.startswith("embed.")} == set()
    assert hybrid(IMAGES).pooled.shape == (2, 32)


def test_an_unknown_pool_is_named():
    with pytest.raises(ValueError, match=r"pool 'max' is unknown; choose from \['class', 'mean'\]"):
        tower("max")
