"""Evaluation pixels are open_clip's; training pixels follow from the random state and each change does what it says."""

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from mmvit.data.transforms import AugmentConfig, eval_pixels, train_pixels

NOTHING = AugmentConfig(crop_area=None)
EVERYTHING = AugmentConfig([0.5, 1.0], [0.7, 1.3], 30.0, 0.1, 0.3, 0.3, 0.3, 0.1)
CHANGES = {
    "crop_area": [0.3, 0.5],
    "zoom": [0.5, 0.7],
    "rotate": 45.0,
    "shift": 0.3,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.9,
    "hue": 0.4,
}


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def changed(image: Image.Image, config: AugmentConfig, seed: int = 0, size: int = 32) -> np.ndarray:
    return train_pixels(image, size, config, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("width", "height"),
    [(300, 200), (200, 300), (97, 31), (31, 97), (224, 224), (225, 224), (50, 333), (10, 13), (1, 40), (33, 32)],
)
@pytest.mark.parametrize("size", [32, 47, 224])
def test_eval_pixels_are_those_of_open_clip(width: int, height: int, size: int):
    image = noise(width, height)
    pipeline = image_transform(size, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    expected = (pipeline(image) * 255).round().to(torch.uint8).numpy()
    assert expected.shape == (3, size, size)
    assert np.array_equal(eval_pixels(image, size), expected)


def test_the_same_random_state_gives_the_same_pixels():
    image = noise(60, 40)
    first = changed(image, EVERYTHING, seed=1)
    assert first.shape == (3, 32, 32)
    assert first.dtype == np.uint8
    assert np.array_equal(first, changed(image, EVERYTHING, seed=1))
    assert not np.array_equal(first, changed(image, EVERYTHING, seed=2))


def test_without_changes_it_is_a_plain_resize():
    image = noise(60, 40)
    plain = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(changed(image, NOTHING), plain)
    unchanged = np.asarray(noise(32, 32)).transpose(2, 0, 1)
    assert np.array_equal(changed(noise(32, 32), NOTHING), unchanged)


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alone_changes_the_picture(name: str):
    image = noise(48, 48)
    config = AugmentConfig(**{"crop_area": None} | {name: CHANGES[name]})
    assert not np.array_equal(changed(image, config), changed(image, NOTHING))


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_in_from_outside_is_white(seed: int):
    config = AugmentConfig(crop_area=None, zoom=[0.5, 0.7], rotate=180.0, shift=0.1)
    assert (changed(Image.new("RGB", (48, 64), "white"), config, seed) == 255).all()
    black = changed(Image.new("RGB", (48, 64), "black"), config, seed)
    assert (black[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert (black[:, 16, 16] == 0).all()


def test_zoom_rotation_and_shift_move_as_they_say():
    """A black square in the middle: how large it gets, where its centre goes."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 0), (24, 24, 40, 40))
    dark = 255.0 - changed(image, NOTHING, size=64)[0]
    zoomed = 255.0 - changed(image, AugmentConfig(None, zoom=[2.0, 2.0]), size=64)[0]
    assert zoomed.sum() / dark.sum() == pytest.approx(4, rel=0.02)
    turned = 255.0 - changed(image, AugmentConfig(None, rotate=90.0), size=64)[0]
    assert turned.sum() / dark.sum() == pytest.approx(1, rel=0.05)
    for seed in range(5):
        shifted = 255.0 - changed(image, AugmentConfig(None, shift=0.25), seed, size=64)[0]
        centre = [np.average(np.arange(64), weights=shifted.sum(axis=axis)) for axis in (0, 1)]
        assert np.abs(np.array(centre) - 31.5).max() <= 16.5


def test_a_crop_keeps_the_asked_share_of_the_area():
    """Two ramps show how much of each side is left."""
    ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8), (200, 1))
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=2))
    for seed in range(20):
        x, y, _ = changed(image, AugmentConfig([0.25, 0.25]), seed).astype(float)
        share = (np.ptp(x) / 255) * (np.ptp(y) / 255)
        assert share == pytest.approx(0.25, rel=0.15)


def test_grey_has_no_colour_to_change():
    grey = Image.new("RGB", (32, 32), (120, 120, 120))
    for name in ("saturation", "hue"):
        assert (changed(grey, AugmentConfig(**{"crop_area": None, name: CHANGES[name]})) == 120).all()


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1)])
def test_extreme_shapes_come_through(shape: tuple[int, int]):
    for seed in range(5):
        assert changed(noise(*shape), EVERYTHING, seed).shape == (3, 32, 32)
