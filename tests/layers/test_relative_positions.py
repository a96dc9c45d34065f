"""Equal offsets share a bias, in the order of Swin's table, on any grid."""

import pytest
import torch
from timm.layers import gen_relative_position_index

from mmvit.layers.positions import resample_positions
from mmvit.layers.relative_positions import RelativePositions, relative_position_index


def test_w6_relative_position_index():
    assert relative_position_index((2, 2)).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    index = relative_position_index((7, 7))
    assert index.shape == (49, 49)
    assert (index.min(), index.max()) == (0, 168)
    assert (index.diagonal() == 84).all()
    for height, width in ((7, 7), (2, 5), (1, 1)):
        assert torch.equal(relative_position_index((height, width)), gen_relative_position_index((height, width)))


def test_w6_equal_offsets_share_a_bias():
    torch.manual_seed(0)
    layer = RelativePositions((3, 4), num_heads=2, num_prefix=0)
    bias = layer((3, 4), relative_position_index((3, 4))[None])[0]
    assert bias.shape == (2, 12, 12)
    places = [(n // 4, n % 4) for n in range(12)]
    offsets = [(a[0] - b[0], a[1] - b[1]) for a in places for b in places]
    for head in bias.flatten(1):
        pairs = set(zip(offsets, head.tolist(), strict=True))
        assert len(pairs) == len(set(offsets)) == 5 * 7


@pytest.mark.parametrize("num_prefix", [1, 3])
def test_other_tokens_have_their_own_biases(num_prefix: int):
    torch.manual_seed(0)
    layer, index = RelativePositions((2, 3), 4, num_prefix), relative_position_index((2, 3))[None]
    bias = layer((2, 3), index)[0]
    assert bias.shape == (4, num_prefix + 6, num_prefix + 6)
    assert torch.equal(bias[:, num_prefix:, num_prefix:], layer.offset_bias[index[0]].permute(2, 0, 1))
    for head, own in zip(bias, layer.prefix_bias, strict=True):
        assert torch.equal(head[:num_prefix, :num_prefix], own[:, :num_prefix])
        assert torch.equal(head[:num_prefix, num_prefix:], own[:, num_prefix, None].expand(-1, 6))
        assert torch.equal(head[num_prefix:, :num_prefix], own[:, num_prefix + 1].expand(6, -1))


def test_some_patches_of_each_image():
    torch.manual_seed(0)
    layer, index = RelativePositions((3, 3), 2, 1), relative_position_index((3, 3))
    whole = layer((3, 3), index[None])[0]
    keep = torch.tensor([[0, 4, 8], [1, 2, 7]])
    bias = layer((3, 3), index[keep[:, :, None], keep[:, None]])
    for image, places in zip(bias, keep, strict=True):
        seen = torch.cat([torch.zeros(1, dtype=torch.long), places + 1])
        assert torch.equal(image, whole[:, seen][:, :, seen])


def test_another_grid_stretches_the_table():
    torch.manual_seed(0)
    layer = RelativePositions((3, 3), 2, 1)
    table = layer.resampled((5, 4))
    assert torch.equal(table, resample_positions(layer.offset_bias, (5, 5), (9, 7)))
    assert layer.resampled((3, 3)) is layer.offset_bias
    bias = layer((5, 4), relative_position_index((5, 4))[None])
    assert torch.equal(bias[0, :, 1:, 1:], table[relative_position_index((5, 4))].permute(2, 0, 1))
