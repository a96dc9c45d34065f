"""The ViT: class token, all kinds of positions, padding, patch dropout, registers, pooling."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmvit.layers.block import Block
from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.drop_path import DropPath
from mmvit.layers.patch_embedding import PatchEmbedding, Patches, patchify, unpatchify
from mmvit.layers.pooling import AttentionPool
from mmvit.layers.positions import FIXED, LEARNED, POSITIONS, combine_axes, resample_positions
from mmvit.models.image_towers import build_image_tower
from mmvit.towers.vit import VisionTransformer, ViTConfig
from mmvit.train.device.memory import checkpoint_activations

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
KINDS = [kind for kind in POSITIONS if kind != "none"]


def tower(pool: str = "class", pre_norm: bool = True, grid: tuple[int, int] = (4, 4), **options) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"mlp_ratio": 4.0, "activation": "gelu", "norm_eps": 1e-5}
    embed = options.pop("embed", None) or PatchEmbedding(4, 32)
    others = {"position": "learned", "distilled": False, "num_registers": 0} | options
    return VisionTransformer(
        embed,
        grid,
        32,
        [Block(32, 4, **shape) for _ in range(2)],
        norm_eps=1e-5,
        pool=AttentionPool(32, 4, **shape) if pool == "attention" else pool,
        pre_norm=pre_norm,
        **others,
    ).eval()


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_pooled_and_tokens(pool: str):
    output = tower(pool)(IMAGES)
    assert output.tokens.shape == (2, 16 + (pool == "class"), 32)
    expected = output.tokens[:, 0] if pool == "class" else output.tokens.mean(dim=1)
    assert torch.equal(output.pooled, expected)


def test_v3_the_class_token_joins_after_the_projection():
    model = tower(pre_norm=False)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(IMAGES).pooled.square().sum().backward()
    (x,) = seen
    assert x.shape == (2, 16 + 1, 32)
    assert torch.equal(x[:, 0], (model.class_token + model.positions[0]).expand(2, -1))
    assert torch.equal(x[:, 1:], model.embed(IMAGES) + model.positions[1:])
    assert model.class_token.grad.any()


@pytest.mark.parametrize("kind", POSITIONS)
def test_v4_permuted_patches_change_the_result_through_the_positions_alone(kind: str):
    model = tower(position=kind)
    for layer in model.relative or ():
        nn.init.normal_(layer.offset_bias)
    permuted = unpatchify(patchify(IMAGES, 4)[:, torch.randperm(16)], 4, (4, 4))
    difference = (model(IMAGES).pooled - model(permuted).pooled).abs().max()
    assert difference < 1e-5 if kind == "none" else difference > 1e-3
    if kind in LEARNED:
        nn.init.zeros_(model.positions)
        assert (model(IMAGES).pooled - model(permuted).pooled).abs().max() < 1e-5


@pytest.mark.parametrize("kind", POSITIONS)
def test_v7_a_tower_with_each_kind_of_position_learns(kind: str):
    """Different images have different outputs, and all parameters get gradients."""
    model = tower(position=kind).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        output = model(IMAGES)
        features = output.pooled + output.tokens.mean(dim=1)  # of the last block's patches too
        loss = nn.functional.cross_entropy(features[:, :2], torch.tensor([0, 1]))
        loss.backward()
        assert [name for name, p in model.named_parameters() if not p.grad.any()] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(("pool", "pre_norm"), [("class", False), ("class", True), ("attention", False)])
def test_every_parameter_gets_a_gradient(pool: str, pre_norm: bool):
    model = tower(pool, pre_norm=pre_norm)
    model(IMAGES).pooled.square().sum().backward()
    # Adding one number to all keys does not change a softmax: their bias gets rounding noise.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_stem_changes_the_stems_names_only():
    names = set(tower().state_dict())
    hybrid = tower(embed=ConvStem([8, 16], 32))
    assert {name for name in names ^ set(hybrid.state_dict()) if not name.startswith("embed.")} == set()
    assert hybrid(IMAGES).pooled.shape == (2, 32)


def test_an_unknown_pool_is_named():
    with pytest.raises(ValueError, match=r"pool 'max' is unknown; choose from \['attention', 'class', 'mean'\]"):
        tower("max")


def test_an_unknown_position_is_named():
    with pytest.raises(ValueError, match=r"position 'polar' is unknown; choose from \['learned', 'learned_2d'"):
        tower(position="polar")


@pytest.mark.parametrize("kind", ["sinusoidal", "sincos_2d", "rotary"])
def test_a_width_that_does_not_fit_the_positions(kind: str):
    with pytest.raises(ValueError, match="width"):
        build_image_tower(ViTConfig(image_size=16, patch_size=4, width=9, depth=1, num_heads=3, position=kind))


POOLS = ["class", "mean", "attention"]
EVERY_KIND = [*(("learned", pool) for pool in POOLS), *((kind, "class") for kind in POSITIONS if kind != "learned")]


@pytest.mark.parametrize(("kind", "pool"), EVERY_KIND)
@pytest.mark.parametrize("grid", [(2, 2), (4, 7), (6, 6)])
def test_v13_another_size_takes_resampled_positions(kind: str, pool: str, grid: tuple[int, int]):
    """It equals a tower whose own positions are the resampled ones, and the tables keep their sizes."""
    model = tower(pool, position=kind)
    before = {name: p.shape for name, p in model.state_dict().items()}
    images = torch.randn(2, 3, 4 * grid[0], 4 * grid[1])
    made_for_it = tower(pool, grid=grid, position=kind)
    made_for_it.load_state_dict(model.state_dict() | model.resampled_tables(grid))
    assert torch.equal(model(images).pooled, made_for_it(images).pooled)
    assert {name: p.shape for name, p in model.state_dict().items()} == before
    own = model.resampled_tables((4, 4))
    assert own.keys() <= before.keys()
    assert all(torch.equal(model.state_dict()[name], table) for name, table in own.items())


def test_v13_the_learned_table_is_resampled_behind_its_first_rows():
    for model in (tower(), tower("mean"), tower(distilled=True)):
        expected = resample_positions(model.positions, (4, 4), (6, 5))
        assert torch.equal(model.resampled_tables((6, 5))["positions"], expected)
        assert torch.equal(expected[: model.num_prefix], model.positions[: model.num_prefix])


@pytest.mark.parametrize("kind", [*LEARNED, *FIXED])
def test_position_tables_have_a_row_for_each_patch(kind: str):
    model = tower(position=kind)
    for grid in ((4, 4), (2, 5)):
        assert model.position_table(grid).shape == (grid[0] * grid[1], 32)
    assert (model.positions is None) == (kind in FIXED)
    if kind == "learned_2d":
        assert model.positions.shape == (1 + 4, 32)
        assert torch.equal(model.position_table((4, 4)), combine_axes(model.positions[1:], (4, 4)))


def test_v6_a_one_hot_tower_is_the_learned_one():
    learned, one_hot = tower(), tower(position="one_hot")
    assert torch.equal(learned(IMAGES).pooled, one_hot(IMAGES).pooled)


def test_positions_of_another_grid_learn():
    model = tower()
    model(torch.randn(2, 3, 8, 24)).pooled.pow(3).sum().backward()
    assert model.positions.grad.any(dim=1).all()


@pytest.mark.parametrize("side", [18, 50])
def test_a_size_that_does_not_divide_is_refused_by_a_stem_too(side: int):
    hybrid = tower("mean", embed=ConvStem([8, 16], 32))
    with pytest.raises(ValueError, match=f"{side}x{side} px is not divisible into patches of 4 px"):
        hybrid(torch.zeros(1, 3, side, side))


@pytest.mark.parametrize(("kind", "pool"), EVERY_KIND)
def test_kept_patches_are_all_that_the_blocks_see(kind: str, pool: str):
    model, keep = tower(pool, position=kind), torch.tensor([[0, 3, 9], [4, 5, 15]])
    for layer in model.relative or ():
        nn.init.normal_(layer.offset_bias)
    output = model(IMAGES, keep)
    assert output.tokens.shape == (2, 3 + (pool == "class"), 32)
    patches = patchify(IMAGES, 4)
    hidden = torch.ones(2, 16, 1).scatter(1, keep[:, :, None], 0.0)
    changed = unpatchify(patches + 5 * hidden, 4, (4, 4))
    assert torch.allclose(model(changed, keep).pooled, output.pooled, atol=1e-6)
    assert not torch.allclose(model(changed).pooled, model(IMAGES).pooled, atol=1e-3)
    assert not torch.allclose(model(IMAGES, keep.flip(0)).pooled, output.pooled, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_patch_keeps_its_place(kind: str):
    """All patches in another order are the same image; so is an image in the corner of a larger one."""
    model = tower(position=kind, num_registers=2)
    for layer in model.relative or ():
        nn.init.normal_(layer.offset_bias)
        nn.init.normal_(layer.prefix_bias)
    expected = model(IMAGES).pooled
    assert torch.equal(model(IMAGES, torch.arange(16).expand(2, -1)).pooled, expected)
    shuffled = torch.stack([torch.randperm(16), torch.randperm(16)])
    assert (model(IMAGES, shuffled).pooled - expected).abs().max() <= 1e-5
    if kind in ("rotary", "sincos_2d"):
        larger = torch.randn(2, 3, 24, 28)
        larger[:, :, :16, :16] = IMAGES
        corner = torch.tensor([[7 * row + column for row in range(4) for column in range(4)]]).expand(2, -1)
        assert (model(larger, corner).pooled - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "pool"), [case for case in EVERY_KIND if case[0] != "relative"])
@pytest.mark.parametrize("num_registers", [0, 2])
def test_an_image_among_others_is_the_image_alone(kind: str, pool: str, num_registers: int):
    """Padding changes nothing: as patches in a mixed batch, as patches alone, and as a plain image."""
    model = tower(pool, position=kind, num_registers=num_registers)
    grids = [(4, 4), (2, 7), (3, 1), (2, 7), (5, 3)]
    images = [torch.randn(1, 3, 4 * rows, 4 * columns) for rows, columns in grids]
    pixels = torch.zeros(5, 20, 48)  # longer than the longest
    for row, image in zip(pixels, images, strict=True):
        cut = patchify(image, 4)[0]
        row[: len(cut)] = cut
    batch = model(Patches(pixels, torch.tensor(grids)))
    assert batch.tokens.shape == (5, 20 + (pool == "class"), 32)
    for i, (image, grid) in enumerate(zip(images, grids, strict=True)):
        plain = model(image)
        alone = model(Patches(patchify(image, 4), torch.tensor([grid])))
        assert (alone.pooled - plain.pooled).abs().max() <= 1e-5
        assert (batch.pooled[i] - plain.pooled[0]).abs().max() <= 1e-5
        assert (batch.tokens[i][batch.mask[i]] - plain.tokens[0]).abs().max() <= 1e-5


def test_padding_has_no_gradient_and_positions_have():
    model = tower("mean")
    pixels = torch.randn(2, 6, 48, requires_grad=True)
    model(Patches(pixels, torch.tensor([[2, 3], [1, 2]]))).pooled.square().sum().backward()
    assert pixels.grad[1, :2].abs().min() > 0
    assert not pixels.grad[1, 2:].any()
    assert model.positions.grad.any(dim=1).all()


def test_patches_are_refused_where_they_cannot_be():
    patches = Patches(torch.zeros(1, 4, 48), torch.tensor([[2, 2]]))
    hybrid = tower("mean", embed=ConvStem([8, 16], 32))
    with pytest.raises(ValueError, match="a convolutional stem needs whole images"):
        hybrid(patches)
    with pytest.raises(ValueError, match="patch dropout needs images of one size"):
        tower()(patches, torch.tensor([[0]]))
    with pytest.raises(ValueError, match="relative positions need images of one size"):
        tower(position="relative")(patches)


@pytest.mark.parametrize("kind", POSITIONS)
def test_d1_the_distillation_token_follows_the_class_token(kind: str):
    model = tower(distilled=True, pre_norm=False, position=kind)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(IMAGES)
    assert output.tokens.shape == (2, 16 + 2, 32)
    assert torch.equal(output.pooled, output.tokens[:, 0])
    assert torch.equal(output.distilled, output.tokens[:, 1])
    assert (output.pooled - output.distilled).abs().max() > 1e-2
    first = torch.stack([model.class_token, model.distillation_token])
    if kind in LEARNED:
        num_rows = {"learned_2d": 4}.get(kind, 16)
        assert model.positions.shape == (num_rows + 2, 32)
        first = first + model.positions[:2]
    assert torch.equal(seen[0][:, :2], first.expand(2, -1, -1))
    assert tower()(IMAGES).distilled is None


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_d1_a_distillation_token_needs_a_class_token(pool: str):
    with pytest.raises(ValueError, match="use pool 'class'"):
        tower(pool, distilled=True)


@pytest.mark.parametrize("pool", POOLS)
def test_registers_are_seen_by_the_blocks_and_not_returned(pool: str):
    model = tower(pool, num_registers=3)
    output = model(IMAGES)
    assert output.tokens.shape == (2, 16 + (pool == "class"), 32)
    assert model.positions.shape == (16 + (pool == "class"), 32)
    output.pooled.square().sum().backward()
    assert model.registers.grad.any(dim=1).all()
    nn.init.normal_(model.registers)
    assert (model(IMAGES).pooled - output.pooled).abs().max() > 1e-3
    assert torch.equal(output.pooled, model.pool(output.tokens))


def test_options_reach_every_block_and_add_no_name_when_off():
    shape = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 4, "num_heads": 4}
    plain = build_image_tower(ViTConfig(**shape))
    options = {"qk_norm": True, "layer_scale": 1e-4, "drop_path": 0.3, "num_registers": 1, "distilled": True}
    model = build_image_tower(ViTConfig(**shape, **options)).train()
    new = {name for name in model.state_dict() if name not in plain.state_dict()}
    tails = {"attention.q_norm", "attention.k_norm", "attention_scale", "feed_forward_scale"}
    expected = {f"blocks.{i}.{tail}" for i in range(4) for tail in tails} | {"registers", "distillation_token"}
    assert {name.removesuffix(".weight").removesuffix(".bias").removesuffix(".gamma") for name in new} == expected
    rates = [block.drop_path.rate if isinstance(block.drop_path, DropPath) else 0.0 for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert (model.blocks[3].attention_scale.gamma == 1e-4).all()
    assert not torch.equal(model(IMAGES).pooled, model(IMAGES).pooled)
    assert torch.equal(model.eval()(IMAGES).pooled, model(IMAGES).pooled)


@pytest.mark.parametrize("kind", POSITIONS)
def test_half_precision_and_recomputation_go_with_each_kind(kind: str):
    shape = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "num_heads": 4}
    model = build_image_tower(ViTConfig(**shape, position=kind, num_registers=1, drop_path=0.5))
    gradients = []
    for mode in ("none", "full"):
        checkpoint_activations(model, mode)
        torch.manual_seed(0)
        model(IMAGES).pooled.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert [name for name in gradients[0] if not torch.equal(gradients[0][name], gradients[1][name])] == []
    expected = model.eval()(IMAGES).pooled
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(IMAGES).pooled - expected).abs().max() < 0.1
    half = model.bfloat16()(IMAGES).pooled
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1


def test_v21_cost_of_a_doubled_side():
    """128 px as tokens of one pixel are 16,384; twice the side is four times the tokens and 16 times the scores."""
    assert patchify(torch.zeros(1, 3, 128, 128, device="meta"), 1).shape[1] == 16_384
    model, scores, linear = tower("mean"), [], []
    for side in (16, 32, 64):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, side, side))
        counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
        scores.append(sum(count for name, count in counts.items() if "attention" in name))
        linear.append(sum(count for name, count in counts.items() if "addmm" in name))
    assert [b / a for a, b in pairwise(scores)] == [16, 16]
    assert [b / a for a, b in pairwise(linear)] == [4, 4]
