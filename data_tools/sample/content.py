"""What the stored bytes of one sample hold: its picture's size, caption, metadata and label, and its fault."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from data_tools.sample.decode import FORMATS, MAX_PIXELS, ImageError, decode_image
from data_tools.tar.scan import IMAGE_FIELDS

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Fault(NamedTuple):
    """Why a sample cannot be delivered: a cause of `errors.CAUSES` and what is wrong."""

    cause: str
    detail: str


class Content(NamedTuple):
    """What a sample holds; None where it lacks the field or the field has a fault.

    `width` and `height` are px of the picture as it is delivered, turned by EXIF; `image_format` is JPEG, PNG or WEBP.
    """

    image_field: str | None = None
    image_format: str | None = None
    width: int | None = None
    height: int | None = None
    caption: str | None = None
    meta: dict[str, Any] | None = None
    label: int | None = None
    fault: Fault | None = None

    @property
    def text(self) -> str | None:
        """The caption, or "caption" of the metadata where there is no txt field."""
        if self.caption is None and self.meta and isinstance(self.meta.get("caption"), str):
            return str(self.meta["caption"]).strip() or None
        return self.caption


class _FaultError(Exception):
    def __init__(self, cause: str, detail: str):
        self.fault = Fault(cause, detail)


def read_content(fields: Mapping[str, bytes], usual: Collection[str] = (), decode: bool = False) -> Content:
    """Read the fields of a sample; the first fault that is found is `fault`, what can be read is there all the same.

    Args:
        fields: stored bytes by field.
        usual: fields of the shard: a sample without `txt` lacks its caption only where others have one.
        decode: decode the whole picture; False reads its header only.
    """
    parts = (
        lambda: _image(fields, decode),
        lambda: _caption(fields, "txt" in usual),
        lambda: _meta(fields),
        lambda: _label(fields),
    )
    found: dict[str, Any] = {}
    fault = None
    for part in parts:
        try:
            found |= part()
        except _FaultError as error:
            fault = fault or error.fault
    return Content(**found, fault=fault)


def _image(fields: Mapping[str, bytes], decode: bool) -> dict[str, Any]:
    field = next((field for field in IMAGE_FIELDS if field in fields), None)
    if field is None:
        raise _FaultError("no-image", f"its fields are: {' '.join(fields) or 'none'}")
    if not fields[field]:
        raise _FaultError("no-image", f".{field} is an empty file")
    try:
        image_format, width, height = read_header(fields[field])
        if width * height > MAX_PIXELS:
            raise _FaultError("too-large", f"the picture has {width} x {height} px, more than {MAX_PIXELS}")
        if decode:
            decode_image(fields[field])
    except ImageError as error:
        raise _FaultError(error.cause, f".{field}: {error.what}") from error
    return {"image_field": field, "image_format": image_format, "width": width, "height": height}


def read_header(data: bytes) -> tuple[str, int, int]:
    """Return format, width and height of a picture as it is delivered, from its header alone.

    Raises:
        ImageError: it is not the beginning of a JPEG, PNG or WebP file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks, and of sizes: our own cap is lower, and an error
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            exif = Image.Exif()
            exif.load(image.info.get("exif") or b"")  # image.getexif() would decode a whole PNG that has none
            sideways = exif.get(ExifTags.Base.Orientation) in _SIDEWAYS
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError("the image cannot be decoded: not a JPEG, PNG or WebP picture") from error
    width, height = reversed(image.size) if sideways else image.size
    return str(image.format), width, height


def _caption(fields: Mapping[str, bytes], required: bool) -> dict[str, Any]:
    if "txt" not in fields:
        if required:
            raise _FaultError("no-caption", f"other samples have .txt, its fields are: {' '.join(fields)}")
        return {}
    caption = _text(fields, "txt").strip()
    if not caption:
        raise _FaultError("empty-caption", ".txt is empty")
    return {"caption": caption}


def _meta(fields: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in fields:
        return {}
    try:
        meta = json.loads(_text(fields, "json"))
        json.dumps(meta, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON and no valid text
    except (ValueError, RecursionError) as error:
        raise _FaultError("bad-json", f".json is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise _FaultError("bad-json", f".json is a {type(meta).__name__} instead of an object")
    return {"meta": meta}


def _label(fields: Mapping[str, bytes]) -> dict[str, Any]:
    if "cls" not in fields:
        return {}
    text = _text(fields, "cls").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise _FaultError("bad-label", f".cls {text[:20]!r} is not a class index")
    return {"label": int(text)}


def _text(fields: Mapping[str, bytes], field: str) -> str:
    try:
        text = fields[field].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _FaultError("not-utf8", f".{field} is not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise _FaultError("not-utf8", f".{field} holds a NUL character")
    return text
