"""From the bytes of an image file to an RGB image, within bounds of format, size and memory."""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from data_tools.core.errors import DataError
from data_tools.core.files import UnreadableError, read_regular
from data_tools.sample.image_header import (
    FORMATS,
    Header,
    ImageError,
    find_orientation,
    format_of,
    read_header,
    refusals,
    too_large,
    unhex,
)

__all__ = ["FORMATS", "ImageError", "Jpeg", "check_size", "decode_image", "open_jpeg", "read_image", "to_rgb"]

# A small file can unfold to a huge image.
MAX_PIXELS = 50_000_000
MAX_SIDE = 65_535  # px, as JPEG has it; a line of 50,000,000 pixels would grow without bound when it is resized
MAX_BYTES = 280 * 2**20  # of memory while decoding

_STRIP_PIXELS = 2**18

# EXIF orientation to the turn that undoes it; 1 is upright. A turn may be 0: compare with None. Pillow's exif_transpose
# also rewrites the EXIF block, and so fails on blocks that cameras write wrongly around a good image.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's raw modes of PNG rows, and what a transparent level must be multiplied with to be compared with its pixels.
_LEVEL_SCALES = {"L;2": 85, "L;4": 17}


class Jpeg(NamedTuple):
    """A JPEG of `width` x `height` px, not decoded yet."""

    data: bytes
    width: int
    height: int
    where: str

    def decode(self, shrink: int = 1, rough: bool = False) -> NDArray[np.uint8]:
        """Decode to uint8 [ceil(height / shrink), ceil(width / shrink), 3].

        Args:
            shrink: 1, 2, 4 or 8; a shrunken image is made of the low frequencies of each block alone.
            rough: take libjpeg's faster arithmetic, which is off by one or two levels of 255 and saves a tenth.

        Raises:
            ImageError: it cannot be decoded.
        """
        height, width = (-(-self.height // shrink), -(-self.width // shrink)) if shrink > 1 else (0, 0)
        try:
            return simplejpeg.decode_jpeg(
                self.data, min_height=height, min_width=width, fastdct=rough, fastupsample=rough
            )
        except Exception:  # simplejpeg does not take the smallest fault, and Pillow decides which are too great
            image = decode_image(self.data, self.where)
            return np.asarray(image if shrink == 1 else image.reduce(shrink))


def decode_image(data: bytes, where: str = "image", formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode an image file to RGB with `to_rgb`.

    Args:
        data: the file's content.
        where: its name in errors.
        formats: what it may be, in Pillow's names.

    Raises:
        ImageError: it cannot be decoded, or would take over `MAX_PIXELS` or `MAX_BYTES`.
    """
    with refusals(where, formats):
        image_format = format_of(data)
        if image_format not in formats:
            return _decode_rare(data, where, formats)
        header = read_header(data, where)
        check_size(header, where)
        image = Image.open(io.BytesIO(header.without_metadata(data)), formats=[header.format])
        return _bare(_turned(_flatten(image), header.orientation))


def _decode_rare(data: bytes, where: str, formats: tuple[str, ...]) -> Image.Image:
    """Decode an image of a format that is not of `FORMATS`, all of it by Pillow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes: our own cap is lower, and an error; of odd metadata
        rare = [name for name in formats if name not in FORMATS]
        if not rare:
            raise UnidentifiedImageError
        image = Image.open(io.BytesIO(data), formats=rare)
        check_size(Header(str(image.format), *image.size, 1, 4, True, b"", 0), where)
        return _bare(_upright(image))


def read_image(path: str | Path) -> Image.Image:
    """Decode the file at `path`; raises DataError where it is missing or unreadable."""
    try:
        data = read_regular(path)
    except UnreadableError as error:
        raise DataError(f"image cannot be read: {error.what}", where=str(path), hint="check the path") from error
    return decode_image(data, where=str(path))


def open_jpeg(data: bytes, where: str = "image") -> Jpeg | None:
    """Return the JPEG by its header; None for all that takes `decode_image`: other formats, CMYK, turned or cut ones.

    Raises:
        ImageError: it is no image, or too large.
    """
    if format_of(data) != "JPEG":
        return None
    header = read_header(data, where)
    check_size(header, where)
    plain = header.channels in (1, 3) and header.orientation == 1 and header.one_scan is not None
    return Jpeg(data, header.width, header.height, where) if plain else None


def check_size(header: Header, where: str = "image") -> None:
    """Raise ImageError if an image would take over `MAX_PIXELS` or `MAX_BYTES`."""
    size, pixels = f"{header.width}x{header.height} px", header.width * header.height
    if pixels > MAX_PIXELS or max(header.width, header.height) > MAX_SIDE:
        raise too_large(f"{size} is over {MAX_PIXELS} px, or a side over {MAX_SIDE}", where)
    if (needed := pixels * _bytes_per_pixel(header)) > MAX_BYTES:
        raise too_large(f"{size} would take {needed >> 20} MiB to decode, over {MAX_BYTES >> 20}", where)


def _bytes_per_pixel(header: Header) -> int:
    """Memory at the peak of decoding, as measured: Pillow's image (1 or 4), a copy (4) and what the decoder holds."""
    if header.format != "JPEG":
        return 8 if header.format == "PNG" else 16
    copied = 8 if header.orientation != 1 else {3: 4, 1: 5}.get(header.channels, 8)
    # One scan of all the channels is decoded as it is read. Several (progressive ones) are collected, 2 bytes a value.
    return copied if header.one_scan else max(copied, 4 + 2 * header.channels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image that a viewer would show, as a new RGB image.

    - It is turned by its EXIF orientation, or that of its XMP metadata; see `image_header`.
    - Integer grey of 16 bits is scaled to 8; so is float grey, from the least of 1, 255 and 65535 that holds it all.
      Pillow itself keeps the upper 8 bits of 16-bit colours.
    - Transparency is laid on white: an alpha channel, a transparent colour, a palette with transparent entries.
    - CMYK is converted without a colour profile, and taken as inverted in a JPEG, which is how Adobe writes it.
    - An animation gives its first frame.

    The result carries no metadata: a second call does not change it.
    """
    rgb = _upright(image)
    return _bare(rgb.copy() if rgb is image else rgb)


def _upright(image: Image.Image) -> Image.Image:
    """Return what `to_rgb` says for an image that Pillow opened; the same object where it is that already."""
    flat = _flatten(image)
    blocks = [_as_bytes(image.info.get(name)) for name in ("exif", "XML:com.adobe.xmp", "xmp")]
    raw = unhex(_as_bytes(image.info.get("Raw profile type exif")))
    return _turned(flat, find_orientation([blocks[0], raw], blocks[1:]))  # of a TIFF, Pillow has undone it


def _as_bytes(value: object) -> bytes:
    return value.encode("utf-8", "replace") if isinstance(value, str) else value if isinstance(value, bytes) else b""


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image as RGB and without transparency; the same object where it is that already."""
    key, low_bytes = _transparent_level(image)
    image.load()  # before the result is there: while it is decoded, the image takes its most
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    full_scale = _full_scale(image)
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):  # strip by strip: a conversion takes several times the image
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if key is not None:
            strip.info["transparency"] = key
        flat = _flatten_strip(strip, full_scale) if low_bytes is None else _cut_out(strip, low_bytes[top : top + rows])
        rgb.paste(flat, (0, top))
    return rgb


def _transparent_level(image: Image.Image) -> tuple[object, NDArray[np.uint8] | None]:
    """Return what is transparent of a PNG that is not decoded yet, as its pixels will be; None where Pillow is right.

    Pillow scales grey of 2 and 4 bits to 8, but not the level of the chunk tRNS. Of RGB of 16 bits it keeps the upper
    bytes alone, and cannot compare them: the second result says where the lower ones are those of the level, 8 pixels
    of a row in a byte.
    """
    level = image.info.get("transparency")
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile or level is None:
        return None, None
    raw_mode = image.tile[0].args
    if isinstance(level, int) and raw_mode in _LEVEL_SCALES:
        return level * _LEVEL_SCALES[str(raw_mode)], None
    if raw_mode != "RGB;16B" or image.fp is None:
        return None, None
    place = image.fp.tell()
    image.fp.seek(0)
    lower = Image.open(io.BytesIO(image.fp.read()), formats=["PNG"])
    image.fp.seek(place)
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # its bytes the other way round: Pillow keeps the lower ones
    lower.load()
    matches = np.empty((image.height, -(-image.width // 8)), dtype=np.uint8)
    for row in range(image.height):
        pixels = np.asarray(lower.crop((0, row, image.width, row + 1)))
        matches[row] = np.packbits((pixels[0] == np.array(level) % 256).all(axis=-1))
    return tuple(value >> 8 for value in level), matches


def _cut_out(strip: Image.Image, low_bytes: NDArray[np.uint8]) -> Image.Image:
    """Return the strip with white where upper and lower bytes are those of the transparent level."""
    pixels = np.array(strip)
    matches = np.unpackbits(low_bytes, axis=-1, count=strip.width).astype(np.bool_)
    pixels[(pixels == strip.info["transparency"]).all(axis=-1) & matches] = 255
    return Image.fromarray(pixels)


def _full_scale(image: Image.Image) -> float | None:
    """Return the pixel value of white; None if it is 255."""
    if image.mode.startswith("I"):
        return 65535.0
    if image.mode != "F":
        return None
    largest = np.nanmax(np.asarray(image), initial=0.0)
    return next((scale for scale in (1.0, 255.0) if largest <= scale), 65535.0)


def _flatten_strip(image: Image.Image, full_scale: float | None) -> Image.Image:
    if full_scale is not None:  # convert("RGB") would saturate it
        values = np.asarray(image, dtype=np.float32)
        grey = np.nan_to_num(values * np.float32(255 / full_scale)).round().clip(0, 255)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _bare(image: Image.Image) -> Image.Image:
    """Return the same pixels without metadata and without the file that they came from."""
    return Image.Image()._new(image.im)
