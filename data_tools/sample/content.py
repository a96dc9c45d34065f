"""The contract of a sample: the only place where its stored bytes become text, metadata, label and captions.

Every reader of samples uses these functions, so that what one of them finds whole is whole for all: `check`, `repair`,
`stats`, `peek`, `filter`, `make`, the tokenizer, training, evaluation, embedding. A fault has a cause and no place:
callers add shard and key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from functools import reduce
from typing import Any, NamedTuple

from data_tools.core.errors import CAUSES
from data_tools.sample.decode import check_size, decode_image
from data_tools.sample.image_header import ImageError, read_header
from data_tools.tar.scan import IMAGE_FIELDS

Label = int | str  # a class index, or a class name

_MAX_DIGITS = 18  # of a class index: it fits into 64 bits
_NUMBER = re.compile(r"[-+]?[\d.,]+")  # no class name, and no class index unless it is digits alone
_AROUND = re.compile(r"\A[\s\ufeff]+|\s+\Z")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # as json.dumps writes it; after an even number of backslashes


class Fault(NamedTuple):
    """Why a sample cannot be delivered: a cause of `errors.CAUSES` and what is wrong."""

    cause: str
    detail: str


class Content(NamedTuple):
    """Content of a sample; None if the field is missing or invalid.

    `width` and `height` are px of the image as it is delivered, turned as its metadata say; `image_format` is JPEG, PNG
    or WEBP.
    """

    image_field: str | None = None
    image_format: str | None = None
    width: int | None = None
    height: int | None = None
    caption: str | None = None
    meta: dict[str, Any] | None = None
    label: Label | None = None
    fault: Fault | None = None

    @property
    def text(self) -> str | None:
        """The caption, or "caption" of the metadata where there is no txt field."""
        if self.caption is None and self.meta and isinstance(self.meta.get("caption"), str):
            return str(self.meta["caption"]).strip() or None
        return self.caption


class FaultError(Exception):
    """Raised for a sample that has a fault; carries no shard and no key."""

    def __init__(self, cause: str, detail: str):
        assert cause in CAUSES, cause
        super().__init__(cause, detail)
        self.fault = Fault(cause, detail)


def read_text(data: bytes, name: str) -> str:
    """Return the text that is stored in `data`, without a byte order mark.

    Raises:
        FaultError: "not-utf8", with `name`: it is not UTF-8, or holds a NUL.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FaultError("not-utf8", f"{name} is not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise FaultError("not-utf8", f"{name} contains a NUL character")
    return text


def strip_caption(text: str) -> str:
    """Return a caption without the space around it and without the byte order marks at its beginning.

    Of several marks the first alone is no text for UTF-8, and the next one would be taken off where it is read again.
    """
    return _AROUND.sub("", text)


def read_caption(fields: Mapping[str, bytes], required: bool = False) -> str | None:
    """Return the text of `txt`, stripped; "" where it is blank, None where there is none.

    Raises:
        FaultError: "not-utf8"; where it is `required`, "no-caption" or "empty-caption".
    """
    if "txt" not in fields:
        if required:
            raise FaultError("no-caption", f"the sample has no caption: its fields are: {' '.join(fields) or 'none'}")
        return None
    caption = strip_caption(read_text(fields["txt"], ".txt"))
    if required and not caption:
        raise FaultError("empty-caption", "the caption is empty")
    return caption


def read_metadata(fields: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return the object of `json`, None where there is none; its texts are valid UTF-8 without NUL, its numbers finite.

    Raises:
        FaultError: "not-utf8" or "bad-json".
    """
    if "json" not in fields:
        return None
    text = read_text(fields["json"], ".json")
    try:
        meta = _DECODER.decode(text)
        # Escapes can spell what no text may hold: half a surrogate pair, or NUL.
        plain = json.dumps(meta, ensure_ascii=False) if "\\u" in text else ""
        plain.encode()
    except (ValueError, RecursionError) as error:
        raise FaultError("bad-json", f"the metadata is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise FaultError("bad-json", f"the metadata is a {type(meta).__name__} instead of an object")
    if "\\u0000" in plain and _NUL.search(plain):
        raise FaultError("bad-json", "the metadata contains a NUL character")
    return meta


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


# NaN and Infinity are not JSON, but Python writes them, and img2dataset with it: they count as null, and so does 1e999.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None, parse_float=_finite)


def read_label(fields: Mapping[str, bytes]) -> Label | None:
    """Return the class index or class name of `cls`, None where there is none; raises FaultError as `parse_label`."""
    return parse_label(read_text(fields["cls"], ".cls")) if "cls" in fields else None


def parse_label(text: str) -> Label:
    """Return the class index (ASCII digits, at most 18) or the class name (one line of printable characters).

    Raises:
        FaultError: "bad-label": it is empty, another number such as -1 or 0.5, or cannot be shown.
    """
    label = text.strip()
    if label.isascii() and label.isdigit() and len(label) <= _MAX_DIGITS:
        return int(label)
    if not label:
        raise FaultError("bad-label", "the label is empty")
    if _NUMBER.fullmatch(label) or not label.isprintable():
        raise FaultError("bad-label", f"the label {label[:20]!a} is neither a class index nor a class name")
    return label


def find_image(fields: Mapping[str, bytes]) -> str:
    """Return the field that holds the image.

    Raises:
        FaultError: "no-image": there is none, or it is an empty file.
    """
    field = next((field for field in IMAGE_FIELDS if field in fields), None)
    if field is None:
        raise FaultError("no-image", f"the sample has no image: its fields are: {' '.join(fields) or 'none'}")
    if not fields[field]:
        raise FaultError("no-image", f"the sample has no image: .{field} is an empty file")
    return field


def find_texts(source: str, caption: str | None, meta: dict[str, Any] | None) -> dict[str, list[str]]:
    """Return language -> texts, stripped, blank ones too; the language is "" where the texts name none.

    Args:
        source: "txt", or a path into the metadata such as "names.ko", whose value is a text, a list of texts or an
            object of language -> text or list. Other values count as missing.
        caption: the text of the sample's `.txt`; None where it has none.
        meta: the object of its `.json`; None where it has none.
    """
    value: Any = caption
    if source != "txt":
        value = reduce(lambda node, name: node.get(name) if isinstance(node, dict) else None, source.split("."), meta)
    by_language = value if isinstance(value, dict) else {"": value}
    found = {
        language: [text.strip() for text in (entry if isinstance(entry, list) else [entry]) if isinstance(text, str)]
        for language, entry in by_language.items()
    }
    return {language: texts for language, texts in found.items() if texts}


def read_content(fields: Mapping[str, bytes], usual: Collection[str] = (), decode: bool = False) -> Content:
    """Read the fields of a sample; the first fault that is found is `fault`, what can be read is there all the same.

    Args:
        fields: stored bytes by field.
        usual: fields of the shard: a sample without `txt` lacks its caption only where others have one.
        decode: decode the whole image; False reads its header only.
    """
    parts = (
        lambda: _read_image(fields, decode),
        lambda: {"caption": read_caption(fields, required="txt" in usual or "txt" in fields)},
        lambda: {"meta": read_metadata(fields)},
        lambda: {"label": read_label(fields)},
    )
    found: dict[str, Any] = {}
    fault = None
    for part in parts:
        try:
            found |= part()
        except FaultError as error:
            fault = fault or error.fault
    return Content(**found, fault=fault)


def _read_image(fields: Mapping[str, bytes], decode: bool) -> dict[str, Any]:
    field = find_image(fields)
    try:
        header = read_header(fields[field])
        check_size(header)
        if decode:
            decode_image(fields[field])
    except ImageError as error:
        raise FaultError(error.cause, f".{field}: {error.what}") from error
    width, height = header.size
    return {"image_field": field, "image_format": header.format, "width": width, "height": height}
