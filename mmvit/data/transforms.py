"""From an RGB image to uint8 pixels of a fixed size."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmvit.models.pixels import CLIP_MEAN, CLIP_STD

_IDENTITY = np.eye(3)
_GREY_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
_LUMINANCE = np.tile([0.299, 0.587, 0.114], (3, 1))  # Rec. 601 weights of red, green and blue

Pixels = UInt8[np.ndarray, "3 H W"]


@dataclass
class PreprocessConfig:
    """What an image goes through before the tower, besides its size; stored with every model."""

    mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(CLIP_STD))


@dataclass
class AugmentConfig:
    """Random changes of training images; None turns one off. The default is CLIP's: a random square crop."""

    crop_area: list[float] | None = field(default_factory=lambda: [0.9, 1.0])  # share of the image's area
    zoom: list[float] | None = None  # factors, for drawings on a white ground
    rotate: float | None = None  # up to so many degrees either way
    shift: float | None = None  # up to this share of the side either way
    brightness: float | None = None  # factor within 1 +- this
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None  # up to this share of the colour circle either way


def eval_pixels(image: Image.Image, size: int) -> Pixels:
    """Resize the shorter side (bicubic), cut out the centre: pixel for pixel what open_clip's PIL pipeline does."""
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return _to_array(image.crop((left, top, left + size, top + size)))


def train_pixels(image: Image.Image, size: int, augment: AugmentConfig, rng: np.random.Generator) -> Pixels:
    """Cut, move and recolour at random, all drawn from `rng`, the sample's own random state."""
    if augment.crop_area:
        image = _random_crop(image, size, augment.crop_area, rng)
    if image.size != (size, size):  # before the affine map, which does not smooth when it shrinks
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    if augment.zoom or augment.rotate or augment.shift:
        image = _random_affine(image, augment, rng)
    return _to_array(_random_colour(image, augment, rng))


def _random_crop(image: Image.Image, size: int, area: list[float], rng: np.random.Generator) -> Image.Image:
    """Random resized crop: area and aspect ratio (3:4 to 4:3) at random (Szegedy et al. 2015)."""
    width, height = image.size
    for _ in range(10):
        pixels = width * height * rng.uniform(area[0], area[1])
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def _random_affine(image: Image.Image, augment: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Zoom, rotate and shift about the centre in one bicubic pass; what comes in from outside is white."""
    width, height = image.size
    zoom = np.exp(rng.uniform(np.log(augment.zoom[0]), np.log(augment.zoom[1]))) if augment.zoom else 1.0
    angle = np.deg2rad(rng.uniform(-1, 1) * (augment.rotate or 0))
    shift_x, shift_y = rng.uniform(-1, 1, size=2) * (augment.shift or 0)
    # PIL wants the map from output to input pixels.
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    left = width * (0.5 + shift_x) - (cos * width - sin * height) / 2
    top = height * (0.5 + shift_y) - (sin * width + cos * height) / 2
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (cos, -sin, left, sin, cos, top),
        resample=Image.Resampling.BICUBIC,
        fillcolor=(255, 255, 255),
    )


def _random_colour(image: Image.Image, augment: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Change hue, saturation, contrast (about middle grey) and brightness as one colour matrix, in one pass."""
    strengths = (augment.hue, augment.saturation, augment.contrast, augment.brightness)
    hue, saturation, contrast, brightness = rng.uniform(-1, 1, size=4) * [strength or 0 for strength in strengths]
    if not any(strengths):
        return image
    angle = 2 * np.pi * hue
    # Rodrigues' formula: a rotation about the grey axis, which leaves greys as they are.
    rotation = np.cos(angle) * _IDENTITY + np.sin(angle) * _GREY_CROSS + (1 - np.cos(angle)) / 3
    gain = (1 + contrast) * (1 + brightness)
    matrix = gain * ((1 + saturation) * rotation - saturation * _LUMINANCE)
    offset = -127.5 * contrast * (1 + brightness)
    return image.convert("RGB", [value for row in matrix.tolist() for value in (*row, offset)])


def _to_array(image: Image.Image) -> Pixels:
    return np.asarray(image).transpose(2, 0, 1)
