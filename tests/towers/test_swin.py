"""The Swin: shifted windows, their masks, patch merging."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmvit.layers.attention import Attention
from mmvit.layers.patch_embedding import PatchEmbedding, Patches, patchify
from mmvit.layers.relative_positions import relative_position_index
from mmvit.towers.swin import (
    PatchMerging,
    SwinBlock,
    SwinConfig,
    SwinTransformer,
    shift_masks,
    window_partition,
    window_reverse,
)

SETTINGS = {"mlp_ratio": 4.0, "activation": "gelu", "norm_eps": 1e-5, "drop_path": 0.0}


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(shift: int = 0, window_size: int = 7, width: int = 8, num_heads: int = 2) -> SwinBlock:
    torch.manual_seed(0)
    made = SwinBlock(width, num_heads, window_size, shift=shift, merges=False, **SETTINGS).eval()
    torch.nn.init.normal_(made.relative_positions)
    return made


def tower(window_size: int = 2, **changed: float) -> SwinTransformer:
    """Return a tower of three stages for feature maps of at least 8, 4, 2 patches of 4 px."""
    torch.manual_seed(0)
    settings = {**SETTINGS, **changed}
    return SwinTransformer(4, 8, [2, 2, 2], [1, 2, 4], window_size=window_size, **settings).eval()


def changed_places(run: object, x: Tensor, row: int, column: int) -> Tensor:
    """Return where the output changes if one position of the input does: [h, w]."""
    other = x.clone()
    other[:, row, column, 0] += 1.0  # in one channel: LayerNorm does not see a change of all
    return (run(other) != run(x)).any(dim=-1)[0]  # type: ignore[operator]


def test_w1_patch_partition_and_linear_embedding():
    swin = SwinTransformer(4, 96, [1, 1, 1, 1], [3, 6, 12, 24], window_size=7, **SETTINGS)
    images = numbers(2, 3, 224, 224)
    patches = patchify(images, 4)
    assert patches.shape == (2, 56 * 56, 48)
    seen = []
    swin.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    swin(images)
    assert seen[0].shape == (2, 56, 56, 96)
    embed = swin.embed
    assert isinstance(embed, PatchEmbedding)
    assert embed.projection.kernel_size == embed.projection.stride == (4, 4)
    linear = swin.pre_norm(embed.embed_patches(patches)).unflatten(1, (56, 56))
    assert (linear - seen[0]).abs().max() <= 1e-5


def test_w2_patch_merging_takes_rows_first():
    merging = PatchMerging(3, norm_eps=1e-5)
    x = numbers(2, 6, 8, 3)
    cells = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    assert torch.equal(merging(x), merging.reduction(merging.norm(cells)))
    assert merging(x).shape == (2, 3, 4, 6)
    assert merging.reduction.bias is None
    assert merging.norm.normalized_shape == (12,)


@pytest.mark.parametrize("sides", [(14, 14), (7, 21), (7, 7)])
def test_w3_windows_come_back(sides: tuple[int, int]):
    x = numbers(3, *sides, 5)
    windows = window_partition(x, 7)
    assert windows.shape == (3 * sides[0] * sides[1] // 49, 49, 5)
    assert torch.equal(windows[0], x[0, :7, :7].flatten(0, 1))
    assert torch.equal(windows[-1], x[-1, -7:, -7:].flatten(0, 1))
    assert torch.equal(window_reverse(windows, 7, sides), x)


def test_w3_cost_of_windows_and_of_global_attention():
    side, width, window = 56, 96, 7
    with torch.device("meta"):
        everywhere = Attention(width, 3)
        windowed = SwinBlock(width, 3, window, shift=0, merges=False, **SETTINGS)
        x = torch.empty(1, side, side, width)
    macs = []
    for run, argument in ((everywhere, x.flatten(1, 2)), (windowed.attend, x)):
        with FlopCounterMode(display=False) as counter:
            run(argument)
        macs.append(counter.get_total_flops() / 2)
    places = side**2
    assert macs[0] == 4 * places * width**2 + 2 * places**2 * width == pytest.approx(2.004e9, rel=5e-4)
    assert macs[1] == 4 * places * width**2 + 2 * window**2 * places * width == pytest.approx(0.145e9, rel=5e-3)


def test_w3_nothing_outside_the_window_counts():
    changed = changed_places(block(), numbers(1, 21, 14, 8), 8, 3)
    expected = torch.zeros(21, 14, dtype=torch.bool)
    expected[7:14, 0:7] = True
    assert torch.equal(changed, expected)


def test_w4_windows_shift_by_half_and_back():
    """A shifted block attends within windows that begin at 3, and each position keeps its own result."""
    swin = tower(window_size=7)
    assert [each.shift for each in swin.blocks] == [0, 3, 0, 3, 0, 3]
    x = numbers(1, 21, 21, 8)
    assert torch.equal(x.roll((-3, -3), (1, 2)).roll((3, 3), (1, 2)), x)
    expected = torch.zeros(21, 21, dtype=torch.bool)
    expected[3:10, 10:17] = True
    assert torch.equal(changed_places(block(shift=3), x, 5, 12), expected)


def test_w4_two_blocks_carry_across_the_borders_of_windows():
    plain, shifted = block(), block(shift=3)
    x = numbers(1, 21, 21, 8)
    alone = changed_places(plain, x, 6, 6)
    assert alone[:7, :7].all()
    assert alone.sum() == 49
    both = changed_places(lambda x: shifted(plain(x)), x, 6, 6)
    assert both[:10, :10].all()
    assert both.sum() == 100


@pytest.mark.parametrize("sides", [(7, 7), (5, 6)])
def test_w4_no_shift_where_one_window_spans_the_map(sides: tuple[int, int]):
    plain, shifted = block(), block(shift=3)
    x = numbers(2, *sides, 8)
    assert torch.equal(plain(x), shifted(x))
    wide = numbers(1, 7, 14, 8)
    places = changed_places(shifted, wide, 2, 5)
    assert places[:, 3:10].all(), "it shifts along the side that has two windows, and along that one alone"
    assert places.sum() == 49


def nine_regions(grid: tuple[int, int], window_size: int, shift: int) -> Tensor:
    """The masks as the paper's figure 4 draws them: number the regions of the shifted map, compare within windows."""
    region = torch.zeros(1, *grid, 1)
    slices = (slice(0, -window_size), slice(-window_size, -shift), slice(-shift, None))
    for i, rows in enumerate(slices):
        for j, columns in enumerate(slices):
            region[:, rows, columns] = 3 * i + j
    windows = window_partition(region, window_size)[..., 0]
    return torch.where(windows[:, :, None] == windows[:, None, :], 0.0, -100.0)


@pytest.mark.parametrize(("window_size", "shift"), [(7, 3), (12, 6), (4, 2)])
@pytest.mark.parametrize("counts", [(2, 2), (3, 5)])
def test_w5_the_masks_are_those_of_nine_regions(window_size: int, shift: int, counts: tuple[int, int]):
    made = block(shift=shift, window_size=window_size)
    torch.nn.init.zeros_(made.relative_positions)
    grid = (counts[0] * window_size, counts[1] * window_size)
    masks = made.score_bias(2, grid)
    expected = nine_regions(grid, window_size, shift).repeat(2, 1, 1)
    assert torch.equal(masks, expected[:, None].expand(-1, 2, -1, -1))
    assert shift_masks(window_size, shift).unique().tolist() == [-100.0, 0.0]


def unwrapped(made: SwinBlock, x: Tensor) -> Tensor:
    """Compute attention in windows that begin at `shift` without wrapping; padding at the border is masked."""
    size, shift = made.window_size, made.shift
    before, after = size - shift, shift
    canvas = F.pad(x, (0, 0, before, after, before, after))
    real = F.pad(torch.ones(1, *x.shape[1:3], 1), (0, 0, before, after, before, after))
    bias = made.relative_positions[made.index].permute(2, 0, 1)
    unseen = torch.where(window_partition(real, size)[..., 0] == 1, 0.0, -torch.inf)  # [nW, N]
    mask = (bias[None] + unseen[:, None, None, :]).repeat(len(x), 1, 1, 1)
    windows = made.attention(window_partition(canvas, size), mask)
    grid = (canvas.shape[1], canvas.shape[2])
    return window_reverse(windows, size, grid)[:, before:-after, before:-after]


@pytest.mark.parametrize("sides", [(14, 14), (21, 28)])
def test_w5_the_shift_equals_padded_windows_that_do_not_wrap(sides: tuple[int, int]):
    made, x = block(shift=3), numbers(2, *sides, 8)
    expected = unwrapped(made, x)
    assert (made.attend(x) - expected).abs().max() <= 1e-6
    made.shift_masks.zero_()
    assert (made.attend(x) - expected).abs().max() > 1e-3, "without the mask they differ"


def test_w5_what_wrapped_from_the_far_side_has_no_attention():
    made, x = block(shift=3), numbers(1, 14, 14, 8)
    seen = []
    made.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    made.attend(x)
    weights = made.attention.weights(*seen[0])  # [4, 2, 49, 49]
    corner = weights[-1].unflatten(1, (7, 7)).unflatten(3, (7, 7))
    assert corner[:, :4, :4, 4:, :].max() <= 1e-30
    assert corner[:, :4, :4, :, 4:].max() <= 1e-30
    assert corner[:, :4, :4, :4, :4].sum(dim=(3, 4)).min() >= 1 - 1e-6
    far = changed_places(made, x, 0, 0)
    assert far[:3, :3].all()
    assert far.sum() == 9


def test_w6_relative_position_bias_index():
    two = relative_position_index((2, 2))
    assert two.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    seven = relative_position_index((7, 7))
    assert seven.shape == (49, 49)
    assert (seven.min(), seven.max()) == (0, 168)
    assert (seven.diagonal() == 84).all()
    places = [(row, column) for row in range(7) for column in range(7)]
    offsets = [[(a[0] - b[0], a[1] - b[1]) for b in places] for a in places]
    shared: dict[tuple[int, int], set[int]] = {}
    for row, indices in zip(offsets, seven.tolist(), strict=True):
        for offset, index in zip(row, indices, strict=True):
            shared.setdefault(offset, set()).add(index)
    assert all(len(indices) == 1 for indices in shared.values())
    assert len(set.union(*shared.values())) == len(shared) == 169


def test_w6_the_bias_is_added_to_the_scores():
    """softmax(Q K^T / sqrt(d) + B) V, written out for one window."""
    made, x = block(window_size=3), numbers(2, 3, 3, 8)
    assert made.relative_positions.shape == (25, 2)
    tokens = x.flatten(1, 2)
    attention = made.attention
    q, k, v = (
        linear(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for linear in (attention.q, attention.k, attention.v)
    )
    bias = torch.empty(2, 9, 9)
    for i in range(9):
        for j in range(9):
            row, column = i // 3 - j // 3, i % 3 - j % 3
            bias[:, i, j] = made.relative_positions[(row + 2) * 5 + column + 2]
    mixed = (q @ k.transpose(2, 3) / 2 + bias).softmax(dim=-1) @ v
    expected = attention.out(mixed.transpose(1, 2).flatten(2)).unflatten(1, (3, 3))
    assert (made.attend(x) - expected).abs().max() <= 1e-6


def test_w7_stages_make_a_pyramid():
    with torch.device("meta"):
        config = SwinConfig()
        swin = SwinTransformer(4, 96, config.depths, config.num_heads, window_size=7, **SETTINGS)
        maps, output = swin.pyramid(torch.empty(2, 3, 224, 224)), swin(torch.empty(2, 3, 224, 224))
    assert [tuple(each.shape) for each in maps] == [(2, 56, 56, 96), (2, 28, 28, 192), (2, 14, 14, 384), (2, 7, 7, 768)]
    assert [224 // each.shape[1] for each in maps] == [4, 8, 16, 32]
    assert (output.tokens.shape, output.pooled.shape) == ((2, 49, 768), (2, 768))
    assert [each.attention.num_heads for each in swin.blocks] == [3] * 2 + [6] * 2 + [12] * 6 + [24] * 2
    assert (swin.width, swin.stride, config.stride) == (768, 32, 32)


def test_the_output_is_the_mean_of_the_normalised_last_map():
    swin, images = tower(), numbers(2, 3, 64, 48)
    output = swin(images)
    assert torch.equal(output.tokens, swin.norm(swin.pyramid(images)[-1]).flatten(1, 2))
    assert torch.equal(output.pooled, output.tokens.mean(dim=1))
    assert output.tokens.shape == (2, 12, 32)
    assert output.mask is None
    assert output.distilled is None


def test_every_parameter_gets_a_gradient():
    swin = tower()
    swin(numbers(2, 3, 64, 64)).pooled.pow(3).sum().backward()
    # Adding one number to all keys does not change a softmax: their bias gets rounding noise.
    assert [name for name, p in swin.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_of_the_bias_are_those_of_the_formula():
    """The gather of bias and mask differentiates like the plain sum, shifted windows and padding included."""
    made = block(shift=1, window_size=3).double()
    x = numbers(1, 7, 6, 8).double()
    assert torch.autograd.gradcheck(
        lambda table: torch.func.functional_call(made, {"relative_positions": table}, (x,)),
        (made.relative_positions.detach().requires_grad_(),),
    )


def test_padding_of_one_map_leaves_no_trace_in_another():
    """One tower processes 64 px, 96x32 px and 64 px again: no state is kept in between."""
    swin = tower(window_size=3).eval()
    small, wide = numbers(1, 3, 64, 64), numbers(1, 3, 96, 48)
    first = swin(small).pooled
    assert swin(wide).pooled.shape == (1, 32)
    assert torch.equal(swin(small).pooled, first)


def test_drop_path_rises_from_block_to_block():
    rates = [each.drop_path.rate for each in tower(drop_path=0.5).blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_drop_path_drops_in_training_alone():
    swin, images = tower(drop_path=0.5), numbers(4, 3, 32, 32)
    assert torch.equal(swin(images).pooled, tower()(images).pooled)
    swin.train()
    assert not torch.equal(swin(images).pooled, swin(images).pooled)


def test_every_norm_has_the_epsilon():
    norms = [each for each in tower(norm_eps=1e-3).modules() if isinstance(each, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 6 + 2 + 1
    assert {each.eps for each in norms} == {1e-3}


def test_initial_values():
    torch.manual_seed(0)
    swin = SwinTransformer(4, 96, [2], [3], window_size=7, **SETTINGS)
    for name, parameter in swin.blocks.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean()) < 0.002, name


def test_masks_and_indices_are_no_weights_and_move_with_the_model():
    swin = tower()
    assert [name for name in swin.state_dict() if "mask" in name or "index" in name] == []
    moved = copy.deepcopy(swin).to("meta")
    assert moved(torch.empty(1, 3, 64, 64, device="meta")).pooled.device.type == "meta"
    assert swin.double()(numbers(1, 3, 64, 64)).pooled.dtype == torch.float64


@pytest.mark.parametrize("train", [False, True])
def test_autocast_keeps_the_result(train: bool):
    swin, images = tower().train(train), numbers(2, 3, 64, 64)
    expected = swin(images).pooled
    with torch.autocast("cpu", torch.bfloat16):
        output = swin(images)
    assert (output.pooled - expected).abs().max() <= 0.05
    output.pooled.float().square().sum().backward()
    assert all(each.relative_positions.grad.isfinite().all() for each in swin.blocks)


@pytest.mark.parametrize(
    ("sides", "window_size", "message"),
    [
        ((60, 60), 2, r"an image of 60x60 px does not fit: its sides must be multiples of 16 px, such as 64x64 px"),
        ((64, 40), 2, r"64x40 px does not fit: .* such as 64x48 px"),
        ((8, 16), 2, r"8x16 px does not fit: .* such as 16x16 px"),
        (
            (48, 48),
            4,
            r"48x48 px has a feature map of 3x3 in stage 3, less than window_size 4; use sides of 64 px .* at most 3$",
        ),
        (
            (64, 32),
            4,
            r"64x32 px has a feature map of 4x2 in stage 3, less than window_size 4; use sides of 64 px .* at most 2$",
        ),
        (
            (16, 16),
            3,
            r"16x16 px has a feature map of 2x2 in stage 2, less than window_size 3; use sides of 48 px .* at most 1$",
        ),
    ],
)
def test_a_size_that_does_not_fit_is_refused(sides: tuple[int, int], window_size: int, message: str):
    swin = tower(window_size)
    with pytest.raises(ValueError, match=message):
        swin(torch.zeros(1, 3, *sides))
    with pytest.raises(ValueError, match=message):
        swin.grids(*sides)


def test_sides_that_the_message_names_fit():
    swin = tower(window_size=4)
    assert swin.grids(64, 80) == [(16, 20), (8, 10), (4, 5)]
    assert swin(torch.zeros(1, 3, 64, 80)).tokens.shape == (1, 20, 32)


def test_single_patches_are_refused():
    with pytest.raises(ValueError, match="needs whole images"):
        tower()(torch.zeros(1, 3, 32, 32), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="needs whole images"):
        tower()(Patches(torch.zeros(1, 4, 48), torch.tensor([[2, 2]])))


def test_tables_for_larger_windows_are_stretched():
    """The 13 x 13 offsets of windows of 7 become the 23 x 23 of windows of 12."""
    swin = tower(window_size=7)
    tables = swin.resampled_tables((12, 12))
    for i, swin_block in enumerate(swin.blocks):
        table = swin_block.relative_positions.detach()
        old = table.T.unflatten(1, (13, 13))[None]
        expected = F.interpolate(old, size=(23, 23), mode="bicubic", antialias=True)[0].flatten(1).T
        assert torch.allclose(tables[f"blocks.{i}.relative_positions"], expected, atol=1e-6)
        assert torch.equal(swin.resampled_tables((7, 7))[f"blocks.{i}.relative_positions"], table)
    assert len(tables) == len(swin.blocks)


@pytest.mark.parametrize(("depths", "heads"), [([2, 2], [1]), ([2, 0], [1, 1]), ([], [])])
def test_stages_must_agree(depths: list[int], heads: list[int]):
    with pytest.raises(ValueError, match="need one number per stage"):
        SwinTransformer(4, 8, depths, heads, window_size=2, **SETTINGS)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 16 is not divisible by num_heads 3"):
        SwinTransformer(4, 8, [1, 1], [1, 3], window_size=2, **SETTINGS)
