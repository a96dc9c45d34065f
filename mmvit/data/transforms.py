"""From an image to uint8 pixels: a square of a fixed size, or the whole image in a budget of patches."""

import functools
import math
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import nn

from data_tools.sample.decode import Jpeg, decode_image, open_jpeg
from mmvit.data.config import AugmentConfig as AugmentConfig
from mmvit.data.config import PreprocessConfig as PreprocessConfig
from mmvit.data.patches import PatchBudget

_IDENTITY = np.eye(3)
_GREY_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
_LUMINANCE = np.tile([0.299, 0.587, 0.114], (3, 1))  # Rec. 601 weights of red, green and blue

_LOG_ASPECTS = np.log(3 / 4), np.log(4 / 3)

# ImageNet's mean colour and its deviation: what timm fills with, and what random erasing draws its noise from.
_FILL = (124, 116, 104)
_FILL_STD = (58.395, 57.12, 57.375)
_ERASED = 0.02, 1 / 3  # share of the area
_LOG_ERASED_ASPECTS = np.log(0.3), np.log(1 / 0.3)
# Of a longer image only the middle is used: resized whole, a line of 1 x 65,535 px would take gigabytes.
_MAX_ASPECT = 256

Pixels = UInt8[np.ndarray, "3 H W"]
Box = tuple[int, int, int, int]  # left, top, right, bottom
Rows = UInt8[np.ndarray, "_ _ 3"]
Size = int | PatchBudget  # side of a square, px; or the most patches of an image that keeps its aspect ratio


def eval_pixels(image: Image.Image, size: Size) -> Pixels:
    """Resize the shorter side (bicubic) and crop the centre, pixel for pixel like open_clip's PIL pipeline.

    With a budget of patches, resize the whole image to what fits.
    """
    if isinstance(size, PatchBudget):
        height, width = size.size(*image.size)
        return _to_pixels(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) > longest:
        left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
        image = image.crop((left, top, image.width - left, image.height - top))
    height, width = _resized(*image.size, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = _centre(*image.size, size)
    return _to_pixels(np.asarray(image.crop((left, top, left + size, top + size))))


def train_pixels(image: Image.Image, size: Size, augment: AugmentConfig, rng: np.random.Generator) -> Pixels:
    """Return the randomly augmented image; everything is drawn from `rng`, the random state of the sample."""
    box, (height, width) = _frame(image.width, image.height, size, augment, rng)
    cut = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return _to_pixels(_vary(np.asarray(cut), augment, rng))


def train_pixels_from_bytes(
    data: bytes,
    size: Size,
    augment: AugmentConfig,
    rng: np.random.Generator,
    *,
    fast: bool = True,
    where: str = "image",
) -> Pixels:
    """Return the `train_pixels` of an image file.

    Args:
        data: the file's content.
        size: of the result.
        augment: the changes.
        rng: the sample's own random state; it draws the same whether `fast` or not.
        fast: decode a JPEG at a reduced scale, at least as large as what is needed of it, and resize it in one pass.
        where: name of the image in errors.

    Raises:
        ImageError: the image cannot be decoded, or is too large.
    """
    jpeg = open_jpeg(data, where) if fast else None
    if jpeg is None:
        return train_pixels(decode_image(data, where), size, augment, rng)
    box, out = _frame(jpeg.width, jpeg.height, size, augment, rng)
    return _to_pixels(_vary(_cut(jpeg, box, out), augment, rng))


def _frame(
    width: int, height: int, size: Size, augment: AugmentConfig, rng: np.random.Generator
) -> tuple[Box, tuple[int, int]]:
    """Return the crop box of an image, and the height and width that it is resized to."""
    if isinstance(size, PatchBudget):
        return (0, 0, width, height), size.size(width, height)
    return _draw_box(width, height, augment, rng), (size, size)


def _draw_box(width: int, height: int, augment: AugmentConfig, rng: np.random.Generator) -> Box:
    """Random resized crop: area and aspect ratio (3:4 to 4:3) at random (Szegedy et al. 2015)."""
    if not augment.crop_area:
        return 0, 0, width, height
    for _ in range(10):
        pixels = width * height * rng.uniform(augment.crop_area[0], augment.crop_area[1])
        ratio = np.exp(rng.uniform(*_LOG_ASPECTS))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _cut(jpeg: Jpeg, box: Box, size: tuple[int, int]) -> Rows:
    """Decode, cut and resize; the cut moves to the nearest whole pixel of the reduced scale."""
    left, top, right, bottom = box
    shrink = _shrink((bottom - top, right - left), size)
    height, width = (bottom - top) / shrink, (right - left) / shrink
    top = min(round(top / shrink), (jpeg.height - bottom + top) // shrink)
    left = min(round(left / shrink), (jpeg.width - right + left) // shrink)
    rows = jpeg.decode(shrink, rough=True)[top : top + math.ceil(height), left : left + math.ceil(width)]
    return _resize(rows, (height, width), size)


def _shrink(extent: tuple[int, int], size: tuple[int, int]) -> int:
    """Return the strongest reduction that leaves both sides of `extent` at those of `size` or more."""
    reduction = min(side // out for side, out in zip(extent, size, strict=True))
    return next(shrink for shrink in (8, 4, 2, 1) if shrink == 1 or reduction >= shrink)


def _resize(rows: Rows, extent: tuple[float, float], size: tuple[int, int]) -> Rows:
    """Resize bicubically like Pillow, in a quarter of its time.

    `extent` is the part of `rows` from the upper left that becomes the result: it ends within their last pixels, where
    the image ends within the last block of a JPEG.
    """
    rows = np.require(rows, requirements=["C", "W"])
    image = torch.from_numpy(rows).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    # The output's size is the product of size and factor, cut to an integer: it must not fall below the wanted one.
    factors = [math.nextafter(out / part, math.inf) for out, part in zip(size, extent, strict=True)]
    resized = F.interpolate(image, scale_factor=factors, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()[: size[0], : size[1]]


def _resized(width: int, height: int, size: Size) -> tuple[int, int]:
    """Return height and width for a shorter side of `size`, or for the budget of patches."""
    if isinstance(size, PatchBudget):
        return size.size(width, height)
    return (int(size * height / width), size) if width <= height else (size, int(size * width / height))


def _centre(width: int, height: int, size: int) -> tuple[int, int]:
    """Return left and top of the square in the middle."""
    return round((width - size) / 2), round((height - size) / 2)


def _vary(rows: Rows, augment: AugmentConfig, rng: np.random.Generator) -> Rows:
    """Apply the enabled transforms in order: flip, affine, colour, erase."""
    if augment.flip and rng.random() < augment.flip:
        rows = np.ascontiguousarray(rows[:, ::-1])
    affine = _draw_affine(rows.shape[0], rows.shape[1], augment, rng)
    colours = _draw_colours(augment, rng)
    if affine or colours or augment.rand_augment or augment.timm_augment:
        image = Image.fromarray(rows)
        if affine:
            image = image.transform(
                image.size,
                Image.Transform.AFFINE,
                affine,
                resample=Image.Resampling.BICUBIC,
                fillcolor=(255, 255, 255),
            )
        if colours:
            image = image.convert("RGB", colours)
        if augment.rand_augment:
            image = _rand_augment(image, augment.rand_augment, rng)
        if augment.timm_augment:
            image = _timm_augment(image, augment.timm_augment, rng)
        rows = np.asarray(image)
    return _erase(rows, rng) if augment.erase and rng.random() < augment.erase else rows


def _draw_affine(height: int, width: int, augment: AugmentConfig, rng: np.random.Generator) -> tuple[float, ...] | None:
    """Zoom, rotate and shift about the centre in one pass; pixels from outside are white.

    Returns the map from output to input pixels.
    """
    if not (augment.zoom or augment.rotate or augment.shift):
        return None
    zoom = np.exp(rng.uniform(np.log(augment.zoom[0]), np.log(augment.zoom[1]))) if augment.zoom else 1.0
    angle = np.deg2rad(rng.uniform(-1, 1) * (augment.rotate or 0))
    shift_x, shift_y = rng.uniform(-1, 1, size=2) * (augment.shift or 0)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    left = width * (0.5 + shift_x) - (cos * width - sin * height) / 2
    top = height * (0.5 + shift_y) - (sin * width + cos * height) / 2
    return cos, -sin, left, sin, cos, top


def _draw_colours(augment: AugmentConfig, rng: np.random.Generator) -> tuple[float, ...] | None:
    """Change hue, saturation, contrast (about middle grey) and brightness as one colour matrix, in one pass."""
    strengths = (augment.hue, augment.saturation, augment.contrast, augment.brightness)
    draws = rng.uniform(-1, 1, size=4)  # always: what else is drawn for the sample does not depend on what is on
    if not any(strengths):
        return None
    hue, saturation, contrast, brightness = draws * [strength or 0 for strength in strengths]
    angle = 2 * np.pi * hue
    # Rodrigues' formula: a rotation about the grey axis, which leaves greys as they are.
    rotation = np.cos(angle) * _IDENTITY + np.sin(angle) * _GREY_CROSS + (1 - np.cos(angle)) / 3
    gain = (1 + contrast) * (1 + brightness)
    matrix = gain * ((1 + saturation) * rotation - saturation * _LUMINANCE)
    offset = -127.5 * contrast * (1 + brightness)
    return tuple(value for row in matrix.tolist() for value in (*row, offset))


def _rand_augment(image: Image.Image, strength: list[int], rng: np.random.Generator) -> Image.Image:
    """RandAugment (Cubuk et al. 2020), drawn from `rng`; torch's own random state does not change."""
    num_changes, magnitude = strength
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # torch.manual_seed would reach the GPUs' too
        return _rand_augmenter(num_changes, magnitude)(image)


@functools.cache
def _rand_augmenter(num_changes: int, magnitude: int) -> nn.Module:
    from torchvision.transforms import v2  # takes more than a second

    return v2.RandAugment(num_changes, magnitude)


def _timm_augment(image: Image.Image, notation: str, rng: np.random.Generator) -> Image.Image:
    """Augment the image with timm, seeded by `rng`; the global random states that timm uses are restored."""
    states = random.getstate(), np.random.get_state()
    seed, numpy_seed = rng.integers(2**32, size=2).tolist()
    random.seed(seed)
    np.random.seed(numpy_seed)
    try:
        return _timm_augmenter(notation)(image)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@functools.cache
def _timm_augmenter(notation: str) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform  # takes more than a second

    return rand_augment_transform(notation, {"img_mean": _FILL, "interpolation": Image.Resampling.BICUBIC})


def _erase(rows: Rows, rng: np.random.Generator) -> Rows:
    """Fill a rectangle with noise (Zhong et al. 2020), as timm's mode "pixel" does it but cut off at 0 and 255."""
    for _ in range(10):
        area = rows.shape[0] * rows.shape[1] * rng.uniform(*_ERASED)
        aspect = np.exp(rng.uniform(*_LOG_ERASED_ASPECTS))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < rows.shape[0] and width < rows.shape[1]:
            top, left = rng.integers(rows.shape[0] - height + 1), rng.integers(rows.shape[1] - width + 1)
            noise = rng.normal(_FILL, _FILL_STD, (height, width, 3))
            rows = rows.copy()
            rows[top : top + height, left : left + width] = noise.round().clip(0, 255)
            break
    return rows


def _to_pixels(rows: Rows) -> Pixels:
    return rows.transpose(2, 0, 1)
