"""Whatever a picture file holds comes out as the RGB image that a viewer would show, or is refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from data_tools.errors import DataError
from data_tools.decode import decode_image, read_image, to_rgb


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def drawing(size: tuple[int, int] = (6, 4)) -> Image.Image:
    values = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(values * 3)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("options", [{"kind": "PNG"}, {"kind": "WEBP", "lossless": True}], ids=["png", "webp"])
def test_lossless_files_come_out_as_they_went_in(options: dict):
    assert (pixels(encoded(drawing(), **options)) == np.asarray(drawing())).all()


def test_a_jpeg_comes_out_about_as_it_went_in():
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    assert abs(pixels(encoded(image, "JPEG", quality=95)) - (200, 30, 90)).max() <= 3


def test_16_bit_grey_is_scaled_and_not_saturated():
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(levels)))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str):
    image = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(0, 0, 0, 0), (0, 0, 0, 51), (0, 0, 0, 255)]):
        image.putpixel((x, 0), value)
    assert pixels(encoded(image.convert(mode)))[0].tolist() == [[255] * 3, [204] * 3, [0] * 3]


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image))[0].tolist() == [[10, 20, 30], [200, 0, 0]]
    assert pixels(encoded(image, transparency=0))[0].tolist() == [[255, 255, 255], [200, 0, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(drawing(), kind, exif=exif, lossless=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert expected.shape[:2] == ((4, 6) if orientation < 5 else (6, 4))
    assert (pixels(data) == expected).all()


def test_a_wrong_exif_entry_does_not_cost_the_picture():
    """An orientation, and a number that is written as text."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 3, "maker"
    block = exif.tobytes()
    width = struct.pack(">H", ExifTags.Base.ImageWidth)
    wrong = block.replace(struct.pack(">H", ExifTags.Base.Make), width, 1)
    assert wrong != block
    expected = np.asarray(drawing().transpose(Image.Transpose.ROTATE_180))
    assert (pixels(encoded(drawing(), exif=wrong)) == expected).all()


def test_a_cmyk_jpeg_keeps_its_colours():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert abs(pixels(encoded(image, "JPEG", quality=95)) - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.6, 0.95])
def test_a_cut_file_is_named(kind: str, keep: float):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(DataError, match="image cannot be decoded") as caught:
        decode_image(data[: int(keep * len(data))], where="a.tar/key7")
    assert caught.value.where == "a.tar/key7"


@pytest.mark.filterwarnings("ignore::UserWarning")  # what Pillow says about damage that it gets over
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_file_gives_an_image_or_the_one_error(kind: str):
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "maker"
    data = encoded(drawing((32, 32)), kind, exif=exif)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(("width", "height"), [(10_000, 6_000), (30_000, 30_000)])
def test_a_picture_of_too_many_pixels_is_refused_unread(width: int, height: int):
    with pytest.raises(DataError, match=r"is over 50000000 px|exceeds limit"):
        decode_image(png_of_size(width, height))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO"])
def test_rare_formats_are_refused(kind: str):
    with pytest.raises(DataError, match="image cannot be decoded") as caught:
        decode_image(encoded(drawing((32, 32)), kind))
    assert "JPEG, PNG, WEBP" in caught.value.mend


def test_a_file_is_read_or_named(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(drawing()))
    assert (np.asarray(read_image(path)) == np.asarray(drawing())).all()
    path.write_bytes(b"no picture")
    for bad in (path, tmp_path / "missing.png", tmp_path):
        with pytest.raises(DataError, match="image cannot be") as caught:
            read_image(bad)
        assert caught.value.where == str(bad)


def test_what_is_no_picture_is_told_in_words():
    with pytest.raises(DataError) as caught:
        decode_image(b"no picture")
    assert caught.value.what == "image cannot be decoded: not a JPEG, PNG or WebP picture"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_turned_once(kind: str):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    once = decode_image(encoded(drawing(), kind, exif=exif))
    assert once.size == (4, 6)
    assert (np.asarray(to_rgb(once)) == np.asarray(once)).all()
