"""Patchify and unpatchify are exact inverses, in the order of the patch embedding."""

import re

import pytest
import torch

from mmvit.layers.patch_embedding import PatchEmbedding, Patches, patch_grid, patchify, unpatchify


@pytest.mark.parametrize(("height", "width", "size"), [(224, 224, 16), (8, 12, 4), (6, 2, 2)])
def test_v1_unpatchify_inverts_patchify_bit_for_bit(height: int, width: int, size: int):
    images = torch.randn(2, 3, height, width)
    patches = patchify(images, size)
    assert patches.shape == (2, height * width // size**2, 3 * size**2)
    assert torch.equal(unpatchify(patches, size, (height // size, width // size)), images)


@pytest.mark.parametrize(
    ("side", "size", "num_patches"), [(224, 16, 196), (224, 32, 49), (224, 14, 256), (256, 16, 256)]
)
def test_v1_counts(side: int, size: int, num_patches: int):
    assert patchify(torch.zeros(1, 3, side, side, device="meta"), size).shape == (1, num_patches, 3 * size**2)


def test_patches_go_row_by_row_with_the_channel_fastest():
    images = torch.arange(3 * 4 * 6).view(1, 3, 4, 6).float()
    expected = [images[0, c, 2 + y, 4 + x].item() for y in range(2) for x in range(2) for c in range(3)]
    assert patchify(images, 2)[0, 5].tolist() == expected  # row 1, column 2


@pytest.mark.parametrize("bias", [False, True])
def test_v2_the_convolution_is_a_linear_map_of_the_patches(bias: bool):
    torch.manual_seed(0)
    embed, images = PatchEmbedding(4, 10, bias=bias), torch.randn(2, 3, 8, 12)
    assert (embed(images) - embed.embed_patches(patchify(images, 4))).abs().max() <= 1e-6
    assert embed(images).shape == (2, 2 * 3, 10)


@pytest.mark.parametrize("cut", [lambda x: patchify(x, 16), PatchEmbedding(16, 8)], ids=["patchify", "embedding"])
def test_v1_a_size_that_does_not_divide_is_refused_with_one_that_fits(cut):
    with pytest.raises(ValueError, match=re.escape("100x7 px is not divisible")) as caught:
        cut(torch.zeros(1, 3, 100, 7))
    height, width = map(int, re.search(r"(\d+)x(\d+) px or", str(caught.value)).groups())
    assert (height, width) == (96, 16)
    cut(torch.zeros(1, 3, height, width))


def test_the_mask_tells_patches_from_what_fills_up():
    patches = Patches(torch.zeros(3, 6, 12, dtype=torch.uint8), torch.tensor([[2, 3], [1, 1], [2, 2]]))
    assert patches.mask().sum(dim=1).tolist() == [6, 1, 4]
    assert patches.mask()[2].tolist() == [True] * 4 + [False] * 2


def test_the_grid_is_rows_by_columns():
    assert patch_grid(32, 48, 16) == (2, 3)
