"""An image keeps its shape: the largest grid that the budget holds, cut as `patchify` cuts."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.demo.synthetic import SyntheticPhotos
from data_tools.sample.decode import decode_image
from mmvit.data.patches import PatchBudget, pack_patches
from mmvit.data.transforms import (
    AugmentConfig,
    eval_pixels,
    train_pixels,
    train_pixels_from_bytes,
)
from mmvit.layers.patch_embedding import patchify

PLAIN = AugmentConfig(crop_area=None)


def rounded(width: int, height: int, scale: float) -> tuple[int, int]:
    """Rows and columns at a scale."""
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@pytest.mark.parametrize("num_patches", [1, 2, 49, 196, 256, 1024])
def test_no_larger_grid_of_that_shape_fits(num_patches: int):
    rng = np.random.default_rng(0)
    for width, height in [(224, 224), (1, 9000), (9000, 1), *rng.integers(1, 2000, (40, 2)).tolist()]:
        rows, columns = PatchBudget(num_patches, 16).grid(width, height)
        assert 1 <= rows * columns <= num_patches
        # The largest of many scales that fits, as found by trying.
        scales = np.geomspace(0.4 / max(width, height), 2 * num_patches / min(width, height), 1000)
        fitting = [grid for grid in (rounded(width, height, s) for s in scales) if grid[0] * grid[1] <= num_patches]
        assert rows * columns >= max(r * c for r, c in fitting)


def test_known_grids():
    budget = PatchBudget(256, 16)
    assert budget.grid(500, 500) == (16, 16)
    assert budget.grid(640, 480) == (14, 18)
    assert budget.grid(480, 640) == (18, 14)
    assert budget.grid(65_535, 1) == (1, 256)
    assert budget.size(640, 480) == (224, 288)


def test_patches_are_those_of_patchify_and_zeros():
    rng = np.random.default_rng(0)
    budget = PatchBudget(12, 4)
    images = [rng.integers(0, 256, (3, 4 * h, 4 * w), np.uint8) for h, w in ((3, 4), (1, 12), (2, 2))]
    packed = pack_patches(images, budget)
    assert (packed.pixels.dtype, tuple(packed.pixels.shape)) == (torch.uint8, (3, 12, 48))
    assert packed.grids.tolist() == [[3, 4], [1, 12], [2, 2]]
    for row, image in zip(packed.pixels, images, strict=True):
        expected = patchify(torch.from_numpy(image)[None].float(), 4)[0]
        assert torch.equal(row[: len(expected)].float(), expected)
        assert not row[len(expected) :].any()


def photo(width: int, height: int) -> tuple[Image.Image, bytes]:
    data = SyntheticPhotos(width, height).jpeg(3)
    return decode_image(data), data


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 700), (40, 30)])
def test_the_whole_picture_is_resized(width: int, height: int):
    image, data = photo(width, height)
    budget = PatchBudget(48, 8)
    rows, columns = budget.size(width, height)
    expected = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    rng = np.random.default_rng(0)
    assert np.array_equal(eval_pixels(image, budget), expected)
    # A crop is not drawn, whatever the configuration says.
    assert np.array_equal(train_pixels(image, budget, AugmentConfig(crop_area=[0.1, 0.2]), rng), expected)
    fast = train_pixels_from_bytes(data, budget, PLAIN, rng, fast=True)
    assert fast.shape == expected.shape
    assert np.abs(fast.astype(int) - expected).mean() < 4


def test_flips_colours_and_rotations_are_those_of_a_square():
    image, _ = photo(400, 200)
    budget = PatchBudget(32, 8)
    plain = train_pixels(image, budget, PLAIN, np.random.default_rng(1))
    flipped = train_pixels(image, budget, AugmentConfig(crop_area=None, flip=1.0), np.random.default_rng(1))
    assert np.array_equal(flipped, plain[:, :, ::-1])
    bright = train_pixels(image, budget, AugmentConfig(crop_area=None, brightness=0.5), np.random.default_rng(1))
    assert bright.shape == plain.shape
    assert not np.array_equal(bright, plain)


def test_rotation_is_about_the_centre_of_what_is_no_square():
    image = Image.new("RGB", (160, 80), (0, 0, 0))
    image.paste((250, 0, 0), (76, 36, 84, 44))
    for seed in range(8):
        augment = AugmentConfig(crop_area=None, rotate=90.0)
        pixels = train_pixels(image, PatchBudget(32, 8), augment, np.random.default_rng(seed)).astype(float)
        red = np.clip(pixels[0] - pixels[1], 0, None)  # white comes in from outside
        at = [(red.sum(axis=axis) * np.arange(red.shape[1 - axis])).sum() / red.sum() for axis in (1, 0)]
        assert at == pytest.approx([(red.shape[0] - 1) / 2, (red.shape[1] - 1) / 2], abs=0.6)
