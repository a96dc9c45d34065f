"""Products of rotated queries and keys depend only on the offset between them."""

import pytest
import torch
from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed

from mmvit.layers.attention import Attention
from mmvit.layers.rotary import rotary_table, rotate


def test_the_product_depends_on_the_offset_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(-1, -1, -1, 5 * 7, -1)
    table = rotary_table((5, 7), 16)[None]
    products = (rotate(q, table) @ rotate(k, table).mT).view(5, 7, 5, 7)
    for rows, columns in ((0, 0), (1, 0), (0, -2), (3, 4)):
        found = [
            products[r, c, r + rows, c + columns].item()
            for r in range(5)
            for c in range(7)
            if 0 <= r + rows < 5 and 0 <= c + columns < 7
        ]
        assert max(found) - min(found) <= 1e-5
    assert products[0, 0].flatten().unique().numel() > 30


def test_lengths_stay_and_tokens_before_the_patches_are_left_alone():
    x = torch.randn(2, 3, 2 + 6, 8)
    turned = rotate(x, rotary_table((2, 3), 8)[None])
    assert torch.equal(turned[:, :, :3], x[:, :, :3])  # so is the patch at (0, 0)
    assert torch.allclose(turned.norm(dim=3), x.norm(dim=3), atol=1e-5)
    assert not torch.allclose(turned[:, :, 3:], x[:, :, 3:], atol=1e-2)
    assert rotate(x.bfloat16(), rotary_table((2, 3), 8)[None]).dtype == torch.bfloat16


def test_the_angles_are_timms():
    """timm rotates adjacent channels; here the pairs are half a head apart."""
    theirs = build_rotary_pos_embed([4, 6], dim=16, temperature=100.0, in_pixels=False)
    theirs = torch.cat(theirs, dim=1)  # [N, 2 * d_h], sines, then cosines
    x = torch.randn(1, 2, 24, 16)
    expected = apply_rot_embed_cat(x, theirs)
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=3)
    found = rotate(halves, rotary_table((4, 6), 16)[None])
    assert torch.allclose(torch.stack(found.chunk(2, dim=3), dim=4).flatten(3), expected, atol=1e-5)


def test_a_larger_grid_continues_the_table():
    small, large = rotary_table((2, 3), 8), rotary_table((4, 5), 8).unflatten(0, (4, 5))
    assert torch.equal(large[:2, :3].flatten(0, 1), small)


def test_attention_turns_queries_and_keys_but_no_values():
    torch.manual_seed(0)
    attention, x, table = Attention(16, 2), torch.randn(2, 7, 16), rotary_table((2, 3), 8)[None]
    q, k, v = (linear(x).unflatten(2, (2, 8)).transpose(1, 2) for linear in (attention.q, attention.k, attention.v))
    weights = (rotate(q, table) @ rotate(k, table).mT * 8**-0.5).softmax(dim=3)
    expected = attention.out((weights @ v).transpose(1, 2).flatten(2))
    assert (attention(x, rotary=table) - expected).abs().max() <= 1e-6
    assert (attention.weights(x, rotary=table) - weights).abs().max() <= 1e-6
    assert (attention(x) - expected).abs().max() > 1e-3


def test_a_head_width_that_does_not_fit():
    with pytest.raises(ValueError, match="a multiple of 4, not 6"):
        rotary_table((2, 2), 6)
