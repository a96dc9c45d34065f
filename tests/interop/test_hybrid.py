"""Copied weights reproduce timm's hybrid ViT; each missing detail of its stem is detected."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mmvit.interop.imported import rename_weights
from mmvit.interop.timm import VIT_NAMES
from mmvit.layers.block import Block
from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.patch_embedding import PatchEmbedding
from mmvit.layers.resnet_stem import ResNetStem, StandardizedConv
from mmvit.towers.vit import VisionTransformer

TOLERANCE = 1e-5  # on unit rows, float32


@pytest.fixture
def reference() -> nn.Module:
    torch.manual_seed(0)
    name = "vit_base_r50_s16_224"
    model = timm.create_model(name, num_classes=0, img_size=64, embed_dim=96, depth=2, num_heads=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 4:  # far from standardised
                parameter.add_(0.5 * parameter.std())
    return model


def hybrid(width: int = 96, depth: int = 2, num_heads: int = 3, side: int = 4) -> VisionTransformer:
    return vit(ResNetStem((3, 4, 9), width), width, depth, num_heads, side)


def vit(
    embed: ResNetStem | PatchEmbedding | ConvStem, width: int, depth: int, num_heads: int, side: int
) -> VisionTransformer:
    return VisionTransformer(
        embed,
        (side, side),
        width,
        [Block(width, num_heads) for _ in range(depth)],
        position="learned",
        norm_eps=1e-6,
        pool="class",
        pre_norm=False,
        distilled=False,
        num_registers=0,
    )


def copied(reference: nn.Module) -> VisionTransformer:
    tower = hybrid().eval()
    tower.load_state_dict(rename_weights(reference.state_dict(), VIT_NAMES))
    return tower


@torch.no_grad()
def difference(tower: VisionTransformer, reference: nn.Module, contrast: float = 1.0) -> float:
    images = contrast * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ours, expected = (F.normalize(each, dim=-1) for each in (tower(images).tokens, reference.forward_features(images)))
    assert ours.shape == expected.shape == (4, 1 + 16, 96)
    return (ours - expected).abs().max().item()


def test_v12_hybrid_gives_equal_tokens(reference: nn.Module):
    assert difference(copied(reference), reference) <= TOLERANCE


def test_v12_missing_weight_standardisation_is_seen(reference: nn.Module):
    tower = copied(reference)
    for module in tower.modules():
        if isinstance(module, StandardizedConv):
            module.forward = lambda x, m=module: F.conv2d(F.pad(x, m.pads), m.weight, stride=m.stride)
    assert difference(tower, reference) > TOLERANCE


def test_a_wrong_epsilon_of_the_group_norms_is_seen(reference: nn.Module):
    """With low-contrast images: otherwise the variances after standardised kernels are large and hide it."""
    tower = copied(reference)
    assert difference(tower, reference, contrast=0.01) <= TOLERANCE
    for module in tower.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    assert difference(tower, reference, contrast=0.01) > TOLERANCE


def test_symmetric_padding_is_seen(reference: nn.Module):
    tower = copied(reference)
    for module in tower.modules():
        if isinstance(module, StandardizedConv) and module.stride == (2, 2) and module.kernel_size == (3, 3):
            module.pads = (1, 0, 1, 0)
    assert difference(tower, reference) > TOLERANCE


def test_v12_swapping_the_stem_changes_only_its_own_names():
    with torch.device("meta"):
        shapes = [
            {name: tensor.shape for name, tensor in tower.state_dict().items() if not name.startswith("embed.")}
            for tower in (hybrid(), vit(PatchEmbedding(16, 96), 96, 2, 3, 4), vit(ConvStem([8] * 4, 96), 96, 2, 3, 4))
        ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]["positions"] == (1 + 16, 96)


def test_v12_r50_vit_b16_has_its_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in hybrid(768, 12, 12, side=14).parameters()) == 97_890_112
