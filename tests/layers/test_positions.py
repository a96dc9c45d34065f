"""Position tables match their formulas; resampling matches timm's, is exact on the same grid, and deterministic."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed

from mmvit.layers.positions import LEARNED, combine_axes, one_hot, resample_positions, sincos_2d, sinusoidal

GRIDS = [
    ((7, 7), (14, 14)),
    ((14, 14), (24, 24)),  # 224 to 384 px
    ((14, 14), (6, 6)),
    ((14, 14), (9, 21)),
    ((4, 9), (9, 4)),
    ((3, 3), (1, 1)),
    ((1, 5), (2, 3)),
    ((6, 6), (6, 1)),
]


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_v13_equals_timm(old: tuple[int, int], new: tuple[int, int], num_prefix: int):
    table = torch.randn(num_prefix + old[0] * old[1], 24, generator=torch.Generator().manual_seed(0))
    expected = resample_abs_pos_embed(table[None], list(new), list(old), num_prefix_tokens=num_prefix)[0]
    found = resample_positions(table, old, new)
    assert (found - expected).abs().max() <= 1e-6
    assert torch.equal(found[:num_prefix], table[:num_prefix])


@pytest.mark.parametrize("kind", LEARNED)
def test_v13_its_own_grid_is_left_alone(kind: str):
    table = torch.randn(LEARNED[kind].num_rows((3, 4)), 8)
    assert LEARNED[kind].resample(table, (3, 4), (3, 4)) is table
    assert not torch.equal(LEARNED[kind].resample(table, (3, 4), (4, 3)), table)


@pytest.mark.parametrize("kind", LEARNED)
def test_v13_a_constant_stays_constant_and_there_and_back_is_close(kind: str):
    old, new = (14, 14), (24, 24)
    num_rows = LEARNED[kind].num_rows(old)
    row = torch.randn(8, generator=torch.Generator().manual_seed(0))
    stretched = LEARNED[kind].resample(row.expand(num_rows, -1), old, new)
    assert len(stretched) == LEARNED[kind].num_rows(new)
    assert (stretched - row).abs().max() <= 1e-5
    smooth = sincos_2d(old, 8) if num_rows == 14 * 14 else torch.linspace(0, 3, 14)[:, None].expand(-1, 8).sin()
    back = LEARNED[kind].resample(LEARNED[kind].resample(smooth, old, new), new, old)
    assert (back - smooth).square().mean().sqrt() <= 0.05 * smooth.square().mean().sqrt()


def test_v13_halves_of_columns_and_rows_are_stretched_apart():
    table = torch.randn(5, 8)
    found = LEARNED["learned_2d"].resample(table, (3, 5), (7, 2))
    columns = resample_positions(table[:, :4], (1, 5), (1, 2))
    rows = resample_positions(table[:3, 4:], (3, 1), (7, 1))
    assert torch.allclose(combine_axes(found, (7, 2))[2 * 2 + 1], torch.cat([columns[1], rows[2]]), atol=1e-6)


def test_v5_patches_of_a_row_share_the_half_for_rows():
    table = torch.randn(5, 8)
    found = combine_axes(table, (3, 5)).unflatten(0, (3, 5))
    for row in range(3):
        for column in range(5):
            assert torch.equal(found[row, column], torch.cat([table[column, :4], table[row, 4:]]))


def test_v6_one_hot_times_a_matrix_is_the_learned_table():
    table = torch.randn(12, 8)
    numbers = torch.arange(12)
    assert torch.equal(one_hot(table, (3, 4)), F.embedding(numbers, table))
    assert torch.equal(F.one_hot(numbers).float() @ table, F.embedding(numbers, table))
    assert torch.equal(LEARNED["learned"].expand(table, (3, 4)), table)


def test_t8_sinusoids():
    table = sinusoidal((100, 100), 64)
    golden = [
        *((0, 0, 0.0), (0, 1, 1.0), (1, 0, math.sin(1)), (1, 1, math.cos(1)), (7, 0, math.sin(7))),
        *((7, 2, math.sin(7 / 10000 ** (2 / 64))), (50, 63, math.cos(50 / 10000 ** (62 / 64)))),
    ]
    for place, column, value in golden:
        assert table[place, column].item() == pytest.approx(value, abs=1e-5)
    assert len(table.unique(dim=0)) == 10_000
    products = table[:200] @ table[:200].T
    for offset in (0, 3, 50):
        diagonal = products.diagonal(offset)
        assert diagonal.max() - diagonal.min() <= 1e-3
    crossings = (table[1:1000].sign() != table[:999].sign()).sum(dim=0)[0::2]
    assert (crossings.diff() <= 0).all()
    assert crossings[0] > 300 > 1 >= crossings[-1]


@pytest.mark.parametrize("step", [1, 5, 17])
def test_t8_a_step_is_a_rotation_wherever_it_starts(step: int):
    table = sinusoidal((10, 20), 16)
    for i in range(8):
        angle = step / 10000 ** (2 * i / 16)
        rotation = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        pairs = table[:, 2 * i : 2 * i + 2]
        assert (pairs[step:] - pairs[:-step] @ rotation.T).abs().max() <= 1e-4


def test_sines_and_cosines_of_both_axes_are_timms_with_the_columns_first():
    rows_first = build_sincos2d_pos_embed([5, 5], dim=16, interleave_sin_cos=True)
    assert (sincos_2d((5, 5), 16) - rows_first.roll(8, dims=1)).abs().max() <= 1e-6
    table = sincos_2d((3, 5), 16).unflatten(0, (3, 5))
    assert table[2, 4, 1].item() == pytest.approx(math.sin(4 / 10000 ** (1 / 4)), abs=1e-6)
    assert table[2, 4, 8 + 4 + 1].item() == pytest.approx(math.cos(2 / 10000 ** (1 / 4)), abs=1e-6)


@pytest.mark.parametrize(("table", "width"), [(sinusoidal, 7), (sincos_2d, 6)])
def test_a_width_that_does_not_fit_is_refused(table, width: int):
    with pytest.raises(ValueError, match=f"not {width}"):
        table((2, 2), width)


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
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample_positions(table, (4, 4), (7, 7)), found)
