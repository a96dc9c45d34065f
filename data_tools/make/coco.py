"""Captions as COCO stores them: a JSON object with a list of images and a list of annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.core.errors import DataError
from data_tools.make.tables import Broken

_PEEK = 8192  # bytes at both ends of a file


class CocoCaptions(NamedTuple):
    """The images of a file, each with its captions; annotations of other images are `orphans`."""

    images: list[dict[str, Any]]
    captions: dict[Any, list[Any]]
    orphans: list[Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the rows."""
        return tuple(dict.fromkeys([*(name for image in self.images for name in image), "captions"]))

    def rows(self) -> Iterator[dict[str, Any] | Broken]:
        """Yield a row for each image, with all of its captions, and one for each image that is not listed."""
        for image in self.images:
            yield {**image, "captions": self.captions.get(image.get("id"), [])}
        for number in self.orphans:
            yield Broken("no-image", f"the annotations name an image that is not listed: {number!r}")


def looks_like_coco(path: Path) -> bool:
    """Return whether a file has annotations with captions, by its first and last bytes."""
    with path.open("rb") as file:
        ends = file.read(_PEEK)
        file.seek(max(0, file.seek(0, os.SEEK_END) - _PEEK))
        ends += file.read()
    return ends.lstrip().startswith(b"{") and b'"caption"' in ends and b'"image_id"' in ends


def read_coco(path: Path) -> CocoCaptions:
    """Read the images and captions of a file.

    Raises:
        DataError: it is not JSON, or has no images or no captions.
    """
    try:
        data = json.loads(path.read_bytes())
        images = [dict(image) for image in data["images"]]
        captions: dict[Any, list[Any]] = {}
        for entry in data["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"the file does not hold captions as COCO does ({type(error).__name__}: {error})"
        hint = 'it needs "images" with "id" and "file_name", and "annotations" with "image_id" and "caption"'
        raise DataError(what, where=str(path), hint=hint) from error
    known = {image.get("id") for image in images}
    return CocoCaptions(images, captions, [number for number in captions if number not in known])
