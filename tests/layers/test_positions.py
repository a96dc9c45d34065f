"""Positions on another grid are timm's, bit for bit the same on their own, and learn alike in each run."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from mmvit.layers.positions import resample_positions

GRIDS = [
    ((7, 7), (14, 14)),
    ((14, 14), (6, 6)),
    ((14, 14), (9, 21)),
    ((4, 9), (9, 4)),
    ((3, 3), (1, 1)),
    ((1, 5), (2, 3)),
    ((6, 6), (6, 1)),
]


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_equals_timm(old: tuple[int, int], new: tuple[int, int], num_prefix: int):
    table = torch.randn(num_prefix + old[0] * old[1], 24, generator=torch.Generator().manual_seed(0))
    expected = resample_abs_pos_embed(table[None], list(new), list(old), num_prefix_tokens=num_prefix)[0]
    found = resample_positions(table, old, new)
    assert (found - expected).abs().max() <= 1e-6
    assert torch.equal(found[:num_prefix], table[:num_prefix])


def test_its_own_grid_is_left_alone():
    table = torch.randn(13, 8)
    assert resample_positions(table, (3, 4), (3, 4)) is table
    assert not torch.equal(resample_positions(table, (3, 4), (4, 3)), table)


def test_the_gradient_is_that_of_torchs_own_resampling():
    torch.manual_seed(0)
    ours, theirs = (torch.arange(96.0).view(12, 8).sin().requires_grad_() for _ in range(2))
    weights = torch.randn(20, 8)
    (resample_positions(ours, (3, 4), (5, 4)) * weights).sum().backward()
    (resample_abs_pos_embed(theirs[None], [5, 4], [3, 4], num_prefix_tokens=0)[0] * weights).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() <= 1e-6


def test_half_precision_is_resampled_in_float32():
    table = torch.randn(16, 8).bfloat16()
    found = resample_positions(table, (4, 4), (7, 7))
    assert torch.equal(found, resample_positions(table.float(), (4, 4), (7, 7)).bfloat16())
