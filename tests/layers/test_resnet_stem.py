"""The hybrid ViT's ResNet stem returns tokens in patch order and standardises its kernels."""

import pytest
import torch
import torch.nn.functional as F

from mmvit.layers.resnet_stem import ResidualUnit, ResNetStem, StandardizedConv


def test_v12_hybrid_stem_makes_14x14_tokens_at_224():
    with torch.device("meta"):
        stem = ResNetStem((3, 4, 9), 768)
        assert stem.patch_size == 16
        assert stem(torch.empty(2, 3, 224, 224)).shape == (2, 14 * 14, 768)
        assert stem(torch.empty(2, 3, 384, 224)).shape == (2, 24 * 14, 768)


def test_stages_double_the_patch_size():
    stem = ResNetStem((1, 2), 24, channels=32)
    assert stem.patch_size == 8
    assert stem(torch.randn(2, 3, 16, 24)).shape == (2, 2 * 3, 24)


def test_kernels_have_mean_0_and_variance_1():
    torch.manual_seed(0)
    conv = StandardizedConv(4, 8, 3)
    with torch.no_grad():
        conv.weight.mul_(5).add_(3)
    impulse = F.pad(torch.eye(4)[:, :, None, None], (2, 2, 2, 2))  # one channel each at the middle of 5x5
    kernels = conv(impulse)[:, :, 1:4, 1:4].transpose(0, 1).flatten(1)  # [out, in * 3 * 3], in another order
    torch.testing.assert_close(kernels.mean(dim=1), torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(kernels.var(dim=1, correction=0), torch.ones(8))


@torch.no_grad()
def test_size_and_offset_of_kernels_do_not_matter():
    torch.manual_seed(0)
    conv, x = StandardizedConv(4, 8, 3), torch.randn(2, 4, 6, 6)
    expected = conv(x)
    conv.weight.mul_(7).add_(1)
    torch.testing.assert_close(conv(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kernel_size", "stride", "before", "after"), [(7, 2, 2, 3), (3, 2, 0, 1), (3, 1, 1, 1)])
def test_padding_is_that_of_same(kernel_size: int, stride: int, before: int, after: int):
    torch.manual_seed(0)
    conv, x = StandardizedConv(2, 3, kernel_size, stride), torch.randn(1, 2, 8, 8)
    padded = F.pad(x, (before, after, before, after))
    weight = conv.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), correction=0, keepdim=True)
    assert conv(x).shape == (1, 3, 8 // stride, 8 // stride)
    torch.testing.assert_close(conv(x), F.conv2d(padded, weight, stride=stride), atol=1e-4, rtol=1e-4)


def test_units_start_as_their_shortcut():
    torch.manual_seed(0)
    stem = ResNetStem((1, 2), 24, channels=32)
    unit = stem.stages[1][1]
    assert isinstance(unit, ResidualUnit)
    x = torch.rand(2, 256, 4, 4)
    assert torch.equal(unit(x), x)
    torch.nn.init.ones_(unit.norm3.weight)
    assert not torch.allclose(unit(x), x)


def test_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    stem, images = ResNetStem((1, 1), 24, channels=32), torch.randn(4, 3, 16, 16)
    assert torch.allclose(stem(images)[1:2], stem(images[1:2]), atol=1e-5)
