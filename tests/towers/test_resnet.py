"""The modified ResNet's feature maps, pooling, tokens and errors."""

import pytest
import torch
from torch import Tensor, nn

from mmvit.layers.patch_embedding import Patches
from mmvit.towers.resnet import Bottleneck, ModifiedResNet, ResNetConfig


def small_tower(image_size: int = 64, depths: tuple[int, ...] = (1, 2, 1, 1)) -> ModifiedResNet:
    torch.manual_seed(0)
    side = image_size // 2 ** (len(depths) + 1)
    return ModifiedResNet((side, side), width=24, depths=depths, stem_width=8, num_heads=4).eval()


def some_images(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_pooled_and_tokens_have_the_width_of_the_embedding():
    tower = small_tower()
    output = tower(some_images())
    assert output.pooled.shape == (3, 24)
    assert output.tokens.shape == (3, 4, 24)
    assert (tower.width, tower.stride) == (24, 32)


def test_the_stride_follows_from_the_number_of_stages():
    assert ResNetConfig().stride == 32
    assert ResNetConfig(depths=[2, 2]).stride == 8
    tower = small_tower(32, depths=(1, 1))
    assert tower.stride == 8
    assert tower(some_images(32, 32)).tokens.shape == (3, 16, 24)


@torch.no_grad()
def test_without_preference_pooled_is_the_mean_of_the_tokens():
    """Return the pooling with uniform attention to all positions and their mean, without position embeddings."""
    tower = small_tower()
    for parameter in (tower.pool.positions, tower.pool.q.weight, tower.pool.q.bias):
        nn.init.zeros_(parameter)
    output = tower(some_images())
    torch.testing.assert_close(output.pooled, output.tokens.mean(dim=1))


@torch.no_grad()
def test_attention_on_one_position_returns_its_token():
    tower = small_tower()
    pool, features = tower.pool, torch.randn(2, 256, 2, 2)
    pool.positions[1 + 2] *= 100  # row 1, column 0
    pool.k.weight.copy_(pool.q.weight)
    nn.init.zeros_(pool.k.bias)
    direction = pool.q(pool.positions[3])
    nn.init.zeros_(pool.q.weight)
    pool.q.bias.copy_(direction)
    output = pool(features)
    torch.testing.assert_close(output.pooled, output.tokens[:, 2])


@torch.no_grad()
def test_other_sizes_resample_the_positions():
    tower, images = small_tower(), some_images(96, 128)
    larger = ModifiedResNet((3, 4), width=24, depths=(1, 2, 1, 1), stem_width=8, num_heads=4).eval()
    larger.load_state_dict(tower.state_dict() | tower.resampled_tables((3, 4)))
    assert torch.equal(larger(images).tokens, tower(images).tokens)
    assert larger(images).tokens.shape == (3, 3 * 4, 24)
    assert torch.equal(larger.pool.positions[0], tower.pool.positions[0])  # the mean's
    assert torch.equal(tower.resampled_tables((2, 2))["pool.positions"], tower.pool.positions)


def test_strided_blocks_skip_no_pixel():
    torch.manual_seed(0)
    block = Bottleneck(8, 4, stride=2).eval()
    images = torch.randn(1, 8, 6, 6, requires_grad=True)
    block.shortcut(images).sum().backward()
    assert images.grad.abs().sum(dim=1).ne(0).all()


def test_blocks_start_as_their_shortcut():
    torch.manual_seed(0)
    tower = small_tower()
    x = torch.rand(2, 64, 4, 4)
    assert torch.equal(tower.stages[1][1](x), x)


def test_statistics_are_those_of_the_batch_in_training_only():
    tower, images = small_tower(), some_images()
    torch.testing.assert_close(tower(images).pooled[:1], tower(images[:1]).pooled)
    tower.train()
    assert not torch.allclose(tower(images).pooled[:1], tower(images[:1]).pooled, atol=1e-3)


def test_all_parameters_are_trained():
    tower = small_tower().train()
    output = tower(some_images())
    (output.pooled.square().sum() + output.tokens.square().sum()).backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_sizes_that_do_not_fit():
    tower = small_tower()
    with pytest.raises(ValueError, match="80x64 px is not divisible into patches of 32 px; 64x64 px"):
        tower(some_images(80, 64))
    with pytest.raises(ValueError, match="256 channels are not divisible by num_heads 7"):
        ModifiedResNet((2, 2), width=24, depths=(1, 1, 1, 1), stem_width=8, num_heads=7)


def test_patches_are_refused():
    tower = small_tower()
    with pytest.raises(ValueError, match="needs whole images"):
        tower(some_images(), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs whole images"):
        tower(Patches(torch.zeros(1, 4, 12), torch.tensor([[2, 2]])))
