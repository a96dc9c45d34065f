"""timm models satisfy the tower contract, family by family."""

import sys

import pytest
import timm
import torch
from torch import Tensor, nn

from mmvit.layers.drop_path import DrawKey, DropPath, drawing
from mmvit.layers.patch_embedding import Patches
from mmvit.towers import timm_tower
from mmvit.towers.timm_tower import TimmConfig, TimmTower

FAMILIES = {  # name: image size, shape of the tokens
    "vit_tiny_patch16_224": (32, (1 + 4, 192)),
    "swin_tiny_patch4_window7_224": (64, (4, 768)),
    "resnet18": (64, (4, 512)),
    "convnext_atto": (64, (4, 320)),
    "mobilenetv2_035": (64, (4, 1280)),
    "mobilenetv3_small_050": (64, (1, 1024)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def tower(request: pytest.FixtureRequest) -> TimmTower:
    torch.manual_seed(0)
    return TimmTower(request.param, FAMILIES[request.param][0]).eval()


def some_images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_pooled_is_what_the_classifier_would_see(tower: TimmTower):
    images = some_images(tower.image_size, tower.image_size)
    output = tower(images)
    assert output.tokens.shape == (2, *FAMILIES[tower.name][1])
    assert output.pooled.shape == (2, tower.width)
    assert torch.equal(output.pooled, tower.model(images))
    assert not any(isinstance(module, nn.Linear) and module.out_features == 1000 for module in tower.modules())


@torch.no_grad()
def test_tokens_stand_row_by_row(tower: TimmTower):
    features = tower.model.forward_features(images := some_images(tower.image_size, tower.image_size))
    tokens = tower(images).tokens
    if features.ndim == 3:
        assert torch.equal(tokens, features)
    elif len(tokens[0]) == 1:
        assert torch.equal(tokens[:, 0], tower(images).pooled)
    else:  # a map of 2 x 2
        place = features[:, 0, 1] if features.shape[-1] == tower.width else features[:, :, 0, 1]
        assert torch.equal(tokens[:, 1], place)
        assert not torch.equal(tokens[:, 2], place)


def test_stride_is_that_of_the_config(tower: TimmTower):
    config = TimmConfig(kind=f"timm:{tower.name}", image_size=tower.image_size)
    assert config.name == tower.name
    assert config.stride == tower.stride == (16 if "vit" in tower.name else 32)


def test_all_parameters_are_trained(tower: TimmTower):
    tower.train()
    output = tower(some_images(tower.image_size, tower.image_size))
    output.pooled.square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []
    tower.zero_grad()
    tower.eval()


def test_other_sizes(tower: TimmTower):
    images = some_images(tower.image_size, 2 * tower.image_size)
    if tower.takes_one_size:
        with pytest.raises(ValueError, match=r"built for images of \d+x\d+ px, got"):
            tower(images)
    else:
        assert tower(images).pooled.shape == (2, tower.width)


def test_patches_are_refused(tower: TimmTower):
    with pytest.raises(ValueError, match="needs whole images"):
        tower(some_images(64, 64), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs whole images"):
        tower(Patches(torch.zeros(1, 4, 12), torch.tensor([[2, 2]])))


@pytest.mark.parametrize("name", ["resnet81", "ResNet18", "resnet18.a1_in1k"])
def test_unknown_names_get_a_hint(name: str):
    with pytest.raises(ValueError, match="; did you mean 'resnet18'"):
        TimmTower(name, 64)
    with pytest.raises(ValueError, match="timm has no model"):
        _ = TimmConfig(kind=f"timm:{name}").stride


def test_timm_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        TimmTower("resnet18", 64)


def test_paths_are_dropped_by_our_layer():
    """timm's Swin drops paths by default, from the random state of a rank."""
    model = nn.Sequential(timm.layers.DropPath(0.1), nn.Sequential(timm.layers.DropPath(0.3), nn.Identity()))
    timm_tower._replace_drop_path(model)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1, 0.3])
    with drawing(model, DrawKey(torch.arange(2), 0)):
        assert model(torch.ones(6, 1)).flatten(0).unflatten(0, (2, 3)).std(dim=1).max() == 0  # three rows a sample
