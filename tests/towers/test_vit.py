"""The ViT: class token after the projection, positions that matter, one vector an image."""

import pytest
import torch

from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.patch_embedding import PatchEmbedding, Patches, patchify, unpatchify
from mmvit.layers.positions import resample_positions
from mmvit.towers.vit import VisionTransformer

SETTINGS = {"mlp_ratio": 4.0, "activation": "gelu", "norm_eps": 1e-5}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tower(pool: str = "class", pre_norm: bool = True) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(PatchEmbedding(4, 32), (4, 4), 32, 2, 4, pool=pool, pre_norm=pre_norm, **SETTINGS).eval()


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_pooled_and_tokens(pool: str):
    output = tower(pool)(IMAGES)
    assert output.tokens.shape == (2, 16 + (pool == "class"), 32)
    expected = output.tokens[:, 0] if pool == "class" else output.tokens.mean(dim=1)
    assert torch.equal(output.pooled, expected)


def test_permuted_patches_change_the_result_through_the_positions_alone():
    model = tower()
    patches = patchify(IMAGES, 4)
    permuted = unpatchify(patches[:, torch.randperm(16)], 4, (4, 4))
    assert (model(IMAGES).pooled - model(permuted).pooled).abs().max() > 1e-3
    torch.nn.init.zeros_(model.positions)
    assert (model(IMAGES).pooled - model(permuted).pooled).abs().max() < 1e-5


@pytest.mark.parametrize(("pool", "pre_norm"), [("class", False), ("class", True), ("attention", False)])
def test_every_parameter_gets_a_gradient(pool: str, pre_norm: bool):
    model = tower(pool, pre_norm=pre_norm)
    model(IMAGES).pooled.square().sum().backward()
    # Adding one number to all keys does not change a softmax: their bias gets rounding noise.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_stem_changes_the_stems_names_only():
    names = set(tower().state_dict())
    hybrid = VisionTransformer(ConvStem([8, 16], 32), (4, 4), 32, 2, 4, pool="class", pre_norm=True, **SETTINGS)
    assert {name for name in names ^ set(hybrid.state_dict()) if not name.startswith("embed.")} == set()
    assert hybrid(IMAGES).pooled.shape == (2, 32)


def test_an_unknown_pool_is_named():
    with pytest.raises(ValueError, match=r"pool 'max' is unknown; choose from \['attention', 'class', 'mean'\]"):
        tower("max")


POOLS = ["class", "mean", "attention"]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("grid", [(2, 2), (4, 7), (6, 6)])
def test_another_size_takes_resampled_positions(pool: str, grid: tuple[int, int]):
    """It equals a tower whose own positions are the resampled ones, and the table keeps its size."""
    model = tower(pool)
    images = torch.randn(2, 3, 4 * grid[0], 4 * grid[1])
    made_for_it = VisionTransformer(PatchEmbedding(4, 32), grid, 32, 2, 4, pool=pool, pre_norm=True, **SETTINGS)
    table = resample_positions(model.positions, (4, 4), grid)
    made_for_it.load_state_dict(model.state_dict() | {"positions": table})
    assert torch.equal(model(images).pooled, made_for_it(images).pooled)
    assert model.positions.shape == (16 + (pool == "class"), 32)


def test_positions_of_another_grid_learn():
    model = tower()
    model(torch.randn(2, 3, 8, 24)).pooled.pow(3).sum().backward()
    assert model.positions.grad.any(dim=1).all()


@pytest.mark.parametrize("side", [18, 50])
def test_a_size_that_does_not_divide_is_refused_by_a_stem_too(side: int):
    hybrid = VisionTransformer(ConvStem([8, 16], 32), (4, 4), 32, 2, 4, pool="mean", pre_norm=True, **SETTINGS)
    with pytest.raises(ValueError, match=f"{side}x{side} px is not divisible into patches of 4 px"):
        hybrid(torch.zeros(1, 3, side, side))


@pytest.mark.parametrize("pool", POOLS)
def test_kept_patches_are_all_that_the_blocks_see(pool: str):
    model, keep = tower(pool), torch.tensor([[0, 3, 9], [4, 5, 15]])
    output = model(IMAGES, keep)
    assert output.tokens.shape == (2, 3 + (pool == "class"), 32)
    patches = patchify(IMAGES, 4)
    hidden = torch.ones(2, 16, 1).scatter(1, keep[:, :, None], 0.0)
    changed = unpatchify(patches + 5 * hidden, 4, (4, 4))
    assert torch.allclose(model(changed, keep).pooled, output.pooled, atol=1e-6)
    assert not torch.allclose(model(changed).pooled, model(IMAGES).pooled, atol=1e-3)
    assert not torch.allclose(model(IMAGES, keep.flip(0)).pooled, output.pooled, atol=1e-3)


def test_keeping_every_patch_changes_nothing():
    model = tower()
    everything = torch.arange(16).expand(2, -1)
    assert torch.equal(model(IMAGES, everything).pooled, model(IMAGES).pooled)


@pytest.mark.parametrize("pool", POOLS)
def test_an_image_among_others_is_the_image_alone(pool: str):
    """Padding changes nothing: as patches in a mixed batch, as patches alone, and as a plain image."""
    model = tower(pool)
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
    hybrid = VisionTransformer(ConvStem([8, 16], 32), (4, 4), 32, 2, 4, pool="mean", pre_norm=True, **SETTINGS)
    with pytest.raises(ValueError, match="a convolutional stem needs whole images"):
        hybrid(patches)
    with pytest.raises(ValueError, match="dropped from images of one size"):
        tower()(patches, torch.tensor([[0]]))
