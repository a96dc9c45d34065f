"""From the bytes of a picture file to an RGB image."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data_tools.errors import DataError

# Rare formats hold most decoder faults, and a small file can unfold to a huge picture: neither gets in.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000

# EXIF orientation to the turn that undoes it. Pillow's exif_transpose also writes the EXIF block anew, and so fails on
# blocks that cameras write wrongly around a good picture.
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, where: str = "image") -> Image.Image:
    """Decode a JPEG, PNG or WebP file to RGB; `where` names it in the DataError for what cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap is lower, and an error
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"image of {image.width}x{image.height} px is over {MAX_PIXELS} px", where=where)
        return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is a memory address
        raise DataError(
            f"image cannot be decoded: {'not a JPEG, PNG or WebP picture' if unknown else error}",
            where=where,
            mend=f"give a whole {', '.join(FORMATS)} file, or remove the sample",
        ) from error


def read_image(path: str | Path) -> Image.Image:
    """Decode the file at `path`; raises DataError where it is missing or unreadable."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"image cannot be read: {error.strerror}", where=str(path), mend="check the path") from error
    return decode_image(data, where=str(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn by EXIF, scale 16-bit grey to 8, lay transparency on white, take an animation's first frame.

    The result carries no metadata: a second call leaves it as it is.
    """
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would saturate it
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb
