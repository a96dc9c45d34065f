"""From one row of a source to the fields of a sample, or the reason why there is none."""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data_tools.core.files import UnreadableError, read_regular
from data_tools.core.names import store_name
from data_tools.sample.classes import as_integer, class_numbers, find_class
from data_tools.sample.content import FaultError, read_metadata, read_text, strip_caption
from data_tools.sample.decode import FORMATS, ImageError, Jpeg, decode_image, open_jpeg

FIELD_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAGIC = {"jpg": b"\xff\xd8", "png": b"\x89PNG", "webp": b"RIFF"}
EXTRA_FORMATS = {"gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}

_MAX_LABEL = 10**18


class Row(NamedTuple):
    """One row of a source, as read; nothing in it has been checked.

    Args:
        source: its name in the source, kept in the metadata.
        image: path of the image, or its bytes.
        captions: one text or list of texts a caption column; empty where the source has no captions.
        label: class index, or class name where the classes have names.
        meta: further columns, or the text of a JSON object.
        siblings: what follows the image's stem in the names of its .txt and .json: ".txt", ".TXT", ".jpg.txt".
        fault: cause and words where the row itself is broken.
    """

    source: str
    image: str | bytes | None = None
    captions: tuple[Any, ...] = ()
    label: Any = None
    meta: Mapping[str, Any] | bytes = {}
    siblings: tuple[str, ...] = ()
    fault: tuple[str, str] | None = None


class Folders(NamedTuple):
    """Relative paths start at `start`; what they lead to, links followed, must lie in `inside` (no links in it)."""

    start: Path
    inside: Path


class SampleRules(NamedTuple):
    """How samples are made of rows; see `data_tools.make.options.MakeOptions` for what a user gives.

    Args:
        folders: where the paths of images lead.
        caption_names: keys of the metadata next to an image that may hold its caption.
        with_captions: each sample needs a caption.
        labels: "names" or "numbers" where each sample needs a label; None for samples without.
        classes: the class names; empty where labels are numbers without names.
        template: makes the caption of a row from its class name.
        resize: px of the shorter side, of images that are larger.
        image_format: "keep" or a field.
        quality: of re-encoded JPEG and WebP images.
        formats: those that may be opened, by Pillow's names.
    """

    folders: Folders
    caption_names: tuple[str, ...]
    with_captions: bool
    labels: str | None
    classes: tuple[str, ...]
    template: str | None
    resize: int | None
    image_format: str
    quality: int
    formats: tuple[str, ...] = FORMATS


def sample_fields(row: Row, rules: SampleRules) -> dict[str, Any]:
    """Return the fields of a row's sample, as `ShardWriter.write` takes them.

    Raises:
        FaultError: the row gives no sample.
    """
    if row.fault:
        raise FaultError(*row.fault)
    data = row.image if isinstance(row.image, bytes) else _read_image(row.image, rules.folders)
    field, data, size = _picture(data, rules)
    meta = {**_meta(row, rules.folders)}
    label = None if rules.labels is None else _label(row.label, rules)
    fields: dict[str, Any] = {field: data}
    if rules.with_captions:
        captions = _captions(_raw_captions(row, meta, label, rules))
        fields["txt"] = captions[0]
        if len(captions) > 1:
            meta["captions"] = captions
    if label is not None:
        fields["cls"] = label
    if size is not None:
        meta |= {name: px for name, px in zip(("width", "height"), size, strict=True) if name in meta}
    meta.setdefault("source", store_name(row.source))
    try:
        return {**fields, "json": _plain(meta)}
    except RecursionError as error:
        raise FaultError("bad-json", "the metadata is nested too deeply") from error


def _read_image(name: object, folders: Folders) -> bytes:
    if not isinstance(name, str) or not name:
        raise FaultError("no-image", "the row has no image")
    if "://" in name[:12]:
        raise FaultError("no-image", "the image is a URL; download the images first, for example with img2dataset")
    data = read_inside(folders, name)
    if not data:
        raise FaultError("no-image", "the file is empty")
    return data


def read_inside(folders: Folders, name: str) -> bytes:
    """Return the content of a regular file.

    Raises:
        FaultError: it is missing, or outside of the folder that images may lie in.
    """
    try:
        path = Path(os.path.realpath(folders.start / name))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FaultError("no-image", f"the file cannot be read: {error}") from error
    if not path.is_relative_to(folders.inside):
        raise FaultError("no-image", f"the path leads outside of {folders.inside} (--image-root DIR allows DIR)")
    try:
        return read_regular(path)
    except UnreadableError as error:
        raise FaultError(error.cause, error.what) from error


def _picture(data: bytes, rules: SampleRules) -> tuple[str, bytes, tuple[int, int] | None]:
    """Return field, bytes, and the size in px where the image was resized; bytes that need no change are kept."""
    if not data:
        raise FaultError("no-image", "the image has no bytes")
    found = next((field for field, magic in _MAGIC.items() if data.startswith(magic)), "")
    field = found if rules.image_format == "keep" else rules.image_format
    try:
        opened = open_jpeg(data) or decode_image(data, formats=rules.formats)
        full = (opened.width, opened.height)
        size = _resized(full, rules.resize)
        if field == found and size == full:
            if isinstance(opened, Jpeg):
                opened.decode(shrink=8)  # finds each fault that decoding the whole finds
            return field, data, None
        if isinstance(opened, Jpeg):
            shrinks = [shrink for shrink in (8, 4, 2) if min(full) >= 2 * shrink * min(size)]
            opened = Image.fromarray(opened.decode(max(shrinks, default=1)))
    except ImageError as error:
        raise FaultError(error.cause, f"{error.what}{_looks_like(data)}") from error
    if opened.size != size:
        opened = opened.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    quality = {} if field == "png" else {"quality": rules.quality}
    try:
        opened.save(buffer, FIELD_FORMATS[field], **quality)
    except (OSError, ValueError) as error:  # WebP has sides of up to 16383 px
        raise FaultError("too-large", f"{size[0]} x {size[1]} px cannot be encoded as {field}: {error}") from error
    return field, buffer.getvalue(), None if size == full else size


def _resized(size: tuple[int, int], shorter: int | None) -> tuple[int, int]:
    scale = 1.0 if shorter is None else min(1.0, shorter / min(size))
    return round(size[0] * scale), round(size[1] * scale)


def _looks_like(data: bytes) -> str:
    """Return what the bytes seem to be, for the hint."""
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return ": it is HTML, XML or SVG"
    if head.startswith(b"gif8"):
        return ": it is a GIF (--allow-formats gif with --format)"
    if data.startswith((b"BM", b"II*\0", b"MM\0*")):
        return ": it is a BMP or TIFF (--allow-formats bmp,tiff with --format)"
    return ": it is AVIF or HEIC" if data[4:8] == b"ftyp" else ""


def _meta(row: Row, folders: Folders) -> Mapping[str, Any]:
    """Return the metadata of a row: its own, or the object in the JSON file next to its image."""
    meta = row.meta
    if (suffix := _sibling(row, ".json")) is not None:
        meta = _beside(row, suffix, folders)
    if not isinstance(meta, bytes):
        return meta
    return read_metadata({"json": meta}) or {}


def _sibling(row: Row, kind: str) -> str | None:
    return next((suffix for suffix in row.siblings if suffix.lower().endswith(kind)), None)


def _beside(row: Row, suffix: str, folders: Folders) -> bytes:
    return read_inside(folders, str(row.image).rpartition(".")[0] + suffix)


def _raw_captions(row: Row, meta: dict[str, Any], label: int | None, rules: SampleRules) -> Iterable[Any]:
    if rules.template is not None and label is not None:
        return [rules.template.replace("{}", rules.classes[label])]
    if (suffix := _sibling(row, ".txt")) is not None:
        return [_beside(row, suffix, rules.folders)]
    if row.captions:
        return row.captions
    named = {name.lower(): name for name in meta}
    return [meta.pop(named[name]) for name in rules.caption_names if name in named][:1]


def _captions(raw: Iterable[Any]) -> list[str]:
    """Return the different texts, stripped and in their order, of single texts and lists of them."""
    given = [text for entry in raw for text in (entry if isinstance(entry, list | tuple) else [entry])]
    texts = dict.fromkeys(text for one in given if (text := _text(one)))
    if not texts:
        empty = any(isinstance(one, str | bytes) for one in given)
        raise FaultError(*(("empty-caption", "it is empty") if empty else ("no-caption", "the row has none")))
    return list(texts)


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        value = read_text(value, "the caption")
    if not isinstance(value, str | int | float):
        raise FaultError("no-caption", f"the caption is a {type(value).__name__} instead of a text")
    text = strip_caption(str(value))
    if "\0" in text or not _encodes(text):
        raise FaultError("not-utf8", "the caption is not UTF-8 or contains a NUL")
    return text


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label(value: Any, rules: SampleRules) -> int:
    if value in (None, ""):
        raise FaultError("bad-label", "the row has no label")
    if rules.classes:
        label = value if rules.labels == "numbers" and isinstance(value, int) else str(value)
        number = find_class(label, _numbers(rules.classes))
        if number is None:
            raise FaultError(
                "bad-label", f"{value!r} is not one of the {len(rules.classes)} classes, nor the number of one"
            )
        return number
    number = as_integer(value)
    if number is None or not 0 <= number < _MAX_LABEL:
        raise FaultError("bad-label", f"{value!r} is not a class number, which starts at 0")
    return number


_numbers = functools.lru_cache(4)(class_numbers)


def _plain(value: Any) -> Any:
    """Return a value as `read_metadata` takes it: no NaN, NUL, bytes or lone surrogates; dates and the like as text."""
    if isinstance(value, str):
        return value.replace("\0", "?").encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(name)): _plain(one) for name, one in value.items() if not isinstance(one, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value if not isinstance(one, bytes)]
    return str(value)
