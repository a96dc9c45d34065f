"""From the bytes of an image file to an RGB image, within bounds of format, size and memory."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from data_tools.core.errors import DataError
from data_tools.core.files import UnreadableError, read_regular

# Rare formats hold most decoder faults, and a small file can unfold to a huge image: neither gets in.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_SIDE = 65_535  # px, as JPEG has it; a line of 50,000,000 pixels would grow without bound when it is resized
MAX_BYTES = 280 * 2**20  # of memory while decoding

_STRIP_PIXELS = 2**18

# EXIF orientation to the turn that undoes it. Pillow's exif_transpose also rewrites the EXIF block, and so fails on
# blocks that cameras write wrongly around a good image.
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(DataError):
    """An image that cannot be decoded; `cause` is its name in `errors.CAUSES`."""

    cause = "bad-image"


class ImageTooLargeError(ImageError):
    """An image that would take too much memory; refused by its header, before it is decoded."""

    cause = "too-large"


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
        except ValueError:  # simplejpeg does not take the smallest fault, and Pillow decides which are too great
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
    with _refusals(where, formats):
        return _bare(_flatten(_open(data, where, formats)))


def read_image(path: str | Path) -> Image.Image:
    """Decode the file at `path`; raises DataError where it is missing or unreadable."""
    try:
        data = read_regular(path)
    except UnreadableError as error:
        raise DataError(f"image cannot be read: {error.what}", where=str(path), hint="check the path") from error
    return decode_image(data, where=str(path))


def open_jpeg(data: bytes, where: str = "image") -> Jpeg | None:
    """Return the JPEG by its header; None for all that takes `decode_image`: other formats, CMYK, EXIF turns.

    Raises:
        ImageError: it is no image, or too large.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    with _refusals(where, FORMATS):
        image = _open(data, where, FORMATS)
        plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and not _turn(image)
        return Jpeg(data, image.width, image.height, where) if plain else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image that a viewer would show, as a new RGB image.

    - It is rotated by its EXIF orientation.
    - Integer grey of 16 bits is scaled to 8; so is float grey, from the least of 1, 255 and 65535 that holds it all.
      Pillow itself keeps the upper 8 bits of 16-bit colours.
    - Transparency is laid on white: an alpha channel, a transparent colour, a palette with transparent entries.
    - CMYK is converted without a colour profile, and taken as inverted in a JPEG, which is how Adobe writes it.
    - An animation gives its first frame.

    The result carries no metadata: a second call does not change it.
    """
    rgb = _flatten(image)
    return _bare(rgb.copy() if rgb is image else rgb)


@contextmanager
def _refusals(where: str, formats: tuple[str, ...]) -> Iterator[None]:
    """Convert errors of Pillow to ImageError."""
    names = f"{', '.join(formats[:-1])} or {formats[-1]}".removeprefix(" or ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes: our own cap is lower, and an error; of odd metadata
            yield
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), where) from error
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is a memory address
        raise ImageError(
            f"image cannot be decoded: {f'not a {names} image' if unknown else error}",
            where=where,
            hint=f"replace it with an intact {names} file, or remove it",
        ) from error


def _too_large(what: str, where: str) -> ImageTooLargeError:
    return ImageTooLargeError(f"image is too large: {what}", where=where, hint="shrink it, or remove it")


def _open(data: bytes, where: str, formats: tuple[str, ...]) -> Image.Image:
    """Read the header; the pixels are not decoded."""
    image = Image.open(io.BytesIO(data), formats=formats)
    size, pixels = f"{image.width}x{image.height} px", image.width * image.height
    if pixels > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise _too_large(f"{size} is over {MAX_PIXELS} px, or a side over {MAX_SIDE}", where)
    if (needed := pixels * _bytes_per_pixel(image, data)) > MAX_BYTES:
        raise _too_large(f"{size} would take {needed >> 20} MiB to decode, over {MAX_BYTES >> 20}", where)
    return image


def _bytes_per_pixel(image: Image.Image, data: bytes) -> int:
    """Memory at the peak of decoding, as measured: Pillow's image (1 or 4), a copy (4) and what the decoder holds."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 8 if image.format == "PNG" else 16
    copied = 8 if _turn(image) else {"RGB": 4, "L": 5}.get(image.mode, 8)
    # One scan of all the channels is decoded as it is read. Several (progressive ones) are collected, 2 bytes a value.
    channels = len(image.getbands())
    assert image.fp is not None
    scan = image.fp.tell() - 2 * channels - 6
    one_scan = not image.info.get("progressive") and data[scan : scan + 3] == bytes((0, 6 + 2 * channels, channels))
    return copied if one_scan else max(copied, 4 + 2 * channels)


def _turn(image: Image.Image) -> Image.Transpose | None:
    return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image turned, as RGB and without transparency; the same object where it is that already."""
    turn = _turn(image)
    image.load()  # before the result is there: while it is decoded, the image takes its most
    if image.mode != "RGB" or image.has_transparency_data:
        full_scale = _full_scale(image)
        rgb = Image.new("RGB", image.size)
        rows = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):  # strip by strip: a conversion takes several times the image
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            rgb.paste(_flatten_strip(strip, full_scale), (0, top))
        image = rgb
    return image if turn is None else image.transpose(turn)


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
