"""The chunk tRNS of a PNG as its specification says, for every colour type and depth, against arithmetic of its own."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data_tools.sample import decode
from data_tools.sample.decode import decode_image, to_rgb
from tests.support.image_files import PNG_CHANNELS, chunk, encoded, png

GREY = [(depth, 0) for depth in (1, 2, 4, 8, 16)]
COLOUR = [(8, 2), (16, 2)]
PALETTE = [(depth, 3) for depth in (1, 2, 4, 8)]


def samples_of(depth: int, channels: int) -> np.ndarray:
    """All levels up to 8 bits; of 16 bits such as differ in one byte only. In rows of 7 pixels, no whole bytes."""
    rng = np.random.default_rng(depth)
    levels = np.arange(2**depth) if depth < 16 else np.array([0, 1, 0x1200, 0x1234, 0x1235, 0x3434, 0x3412, 0xFFFF])
    samples = rng.choice(levels, (40, 7, channels))
    samples.flat[: len(levels)] = levels
    samples[39] = levels[len(levels) // 2]  # a row of one colour
    return samples


def to_8_bits(samples: np.ndarray, depth: int, colour: int) -> np.ndarray:
    """Levels as they are delivered: scaled to 255, but colours of 16 bits by their upper byte."""
    if depth == 16 and colour != 0:
        return samples // 256
    return np.floor(samples * 255 / (2**depth - 1) + 0.5).astype(int)


def keys_of(depth: int, channels: int) -> list[list[int]]:
    """Levels in the middle and at both ends of the range; of 16 bits neighbours, and the same bytes the other way."""
    levels = sorted({0, 1, 2**depth // 2, 2**depth - 2, 2**depth - 1})
    if depth == 16:
        levels = [0, 0x1234, 0x1235, 0x3412, 0x3434, 0x7777, 0xFFFF]
    return [[level] * channels for level in levels]


@pytest.mark.parametrize(("depth", "colour"), GREY + COLOUR)
@pytest.mark.parametrize("unused_bits", [0, 0xFFFF], ids=["", "unused-bits-set"])
def test_one_level_is_transparent(depth: int, colour: int, unused_bits: int):
    channels = PNG_CHANNELS[colour]
    samples = samples_of(depth, channels)
    keys = [*keys_of(depth, channels), samples[3, 2].tolist(), samples[0, 0].tolist()]
    keys += [[key[0], *[(level + 1) % 2**depth for level in key[1:]]] for key in keys if channels > 1]
    for key in keys:
        stored = [level | (unused_bits >> depth << depth) for level in key]
        data = png(samples, depth, colour, chunk(b"tRNS", struct.pack(f">{channels}H", *stored)))
        clear = (samples == key).all(axis=-1, keepdims=True)
        expected = np.where(clear, 255, np.broadcast_to(to_8_bits(samples, depth, colour), (40, 7, 3)))
        assert np.array_equal(decode_image(data), expected), key
        if not unused_bits:
            with Image.open(io.BytesIO(data)) as image:
                assert np.array_equal(to_rgb(image), expected), key


@pytest.mark.parametrize(("depth", "colour"), PALETTE)
@pytest.mark.parametrize("num_alphas", [0, 1, 2, 3, 16, 200, 256, 300])
def test_a_palette_may_be_transparent_in_part(depth: int, colour: int, num_alphas: int):
    """What has no alpha of its own is opaque; alphas of colours that there are not are left out."""
    rng = np.random.default_rng(num_alphas)
    samples = samples_of(depth, 1)
    palette = rng.integers(0, 256, (2**depth, 3))
    for alphas in (rng.integers(0, 256, num_alphas), np.zeros(num_alphas, int), np.full(num_alphas, 255)):
        given = chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + chunk(b"tRNS", alphas.astype(np.uint8).tobytes())
        alpha = np.concatenate([alphas, np.full(256, 255)])[: 2**depth, None] / 255
        expected = (palette * alpha + 255 * (1 - alpha))[samples[..., 0]]
        assert np.abs(np.asarray(decode_image(png(samples, depth, colour, given))) - expected).max() <= 1


@pytest.mark.parametrize(("depth", "colour"), [(8, 4), (16, 4), (8, 6), (16, 6)])
def test_alpha_is_laid_on_white_and_a_transparent_level_besides_is_left_out(depth: int, colour: int):
    samples = samples_of(depth, PNG_CHANNELS[colour])
    data = png(samples, depth, colour, chunk(b"tRNS", struct.pack(">3H", *[int(samples[0, 0, 0])] * 3)))
    values = samples // 256 if depth == 16 else samples
    alpha = values[..., -1:] / 255
    expected = values[..., :-1] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(decode_image(data)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (chunk(b"tRNS", b"\0"), b""),
        (chunk(b"tRNS", b""), b""),
        (chunk(b"tRNS", bytes(6)), b""),
        (chunk(b"tRNS", b"\0\2", checksum=1), b""),
        (b"", chunk(b"tRNS", b"\0\2")),
    ],
    ids=["short", "empty", "long", "checksum", "after-the-pixels"],
)
def test_a_wrong_chunk_leaves_the_image_opaque(before: bytes, after: bytes):
    samples = samples_of(2, 1)
    found = np.asarray(decode_image(png(samples, 2, 0, before, after)))
    assert np.array_equal(found[..., :1], samples * 85)


def test_the_first_of_two_chunks_counts():
    samples = samples_of(4, 1)
    data = png(samples, 4, 0, chunk(b"tRNS", b"\0\5") + chunk(b"tRNS", b"\0\6"))
    assert np.array_equal(np.asarray(decode_image(data))[..., :1], np.where(samples == 5, 255, samples * 17))


@pytest.mark.parametrize(("depth", "colour"), [(4, 0), (16, 0), (16, 2)])
def test_strips_have_no_seam(monkeypatch: pytest.MonkeyPatch, depth: int, colour: int):
    samples = samples_of(depth, PNG_CHANNELS[colour])
    key = samples[39, 0].tolist()
    data = png(samples, depth, colour, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    whole = np.asarray(decode_image(data))
    monkeypatch.setattr(decode, "_STRIP_PIXELS", 21)
    assert np.array_equal(decode_image(data), whole)
    assert (whole[39] == 255).all()


def test_an_interlaced_png_has_the_same_pixels():
    """Pillow writes none; the two bytes of one pixel lie in its first pass."""
    data = png(np.full((1, 1, 3), 0x1234), 16, 2, chunk(b"tRNS", struct.pack(">3H", *[0x1234] * 3)))
    head = data[12:29]
    interlaced = data.replace(data[8:33], chunk(b"IHDR", head[4:-1] + b"\1"))
    assert interlaced != data
    assert np.asarray(decode_image(interlaced)).tolist() == [[[255] * 3]]


def test_an_image_that_pillow_has_decoded_already_is_taken_as_pillow_has_it():
    image = Image.open(io.BytesIO(encoded(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "PNG")))
    image.load()
    assert np.asarray(to_rgb(image)).min() == 255
