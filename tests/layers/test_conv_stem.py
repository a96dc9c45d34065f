"""The convolutional stem returns tokens in patch order, each from its neighbourhood."""

import pytest
import torch

from mmvit.layers.conv_stem import ConvStem, ResidualConv


def test_n_convolutions_make_patches_of_two_to_the_n():
    stem = ConvStem([8, 16, 32], 24)
    assert stem.patch_size == 8
    assert stem(torch.randn(2, 3, 32, 48)).shape == (2, 4 * 6, 24)


def test_a_token_sees_its_own_place():
    """The gradient of token (row 1, column 2) is in and around pixels 8..15 x 16..23 (before normalisation)."""
    stem = ConvStem([8, 16, 32], 24)
    stem.convolutions = torch.nn.Sequential(*(m for m in stem.convolutions if not isinstance(m, torch.nn.GroupNorm)))
    images = torch.randn(1, 3, 32, 48, requires_grad=True)
    stem(images)[0, 1 * 6 + 2].sum().backward()
    rows, columns = images.grad[0].abs().sum(dim=0).nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 15, 9, 23)


def test_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    stem, images = ConvStem([8, 16, 32], 24), torch.randn(4, 3, 16, 16)
    assert torch.allclose(stem(images)[1:2], stem(images[1:2]), atol=1e-6)


def test_residual_blocks_start_as_the_identity():
    torch.manual_seed(0)
    stem = ConvStem([16, 32], width=8, num_residuals=[0, 2])
    blocks = [module for module in stem.modules() if isinstance(module, ResidualConv)]
    x = torch.randn(2, 32, 4, 4)
    assert len(blocks) == 2
    for block in blocks:
        assert torch.equal(block(x), x)
        torch.nn.init.normal_(block.last.weight)
        assert not torch.allclose(block(x), x)


def test_numbers_of_residual_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="1 numbers of residual blocks for 2 convolutions"):
        ConvStem([16, 32], width=8, num_residuals=[1])
