"""Rows of a folder of images: with texts of the same name next to them, or in one folder a class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.core.folders import IMAGES, walk_folders
from data_tools.make.row import Row

_TEXTS = (".txt", ".json")


def kind_of_images(path: Path) -> str:
    """Return "folder" for images with texts, or right in the folder, else "classes"."""
    for folder, names in walk_folders(path, Counter()):
        suffixes: dict[str, set[str]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 (of a name, many times)
            suffixes.setdefault(stem, set()).add(suffix.lower())
        images = [stem for stem, found in suffixes.items() if found & IMAGES]
        if images and (not folder or any(suffixes[stem] & {*_TEXTS} for stem in images)):
            return "folder"
    return "classes"


class Tally(NamedTuple):
    """What a folder holds: files that give no row, texts next to images, and images in each folder of the top."""

    aside: Counter[str]
    texts: Counter[str]
    images: Counter[str]


def image_rows(root: Path, kind: str, tally: Tally) -> Iterator[Row]:
    """Yield a row for each image, and count what was found."""
    for folder, names in walk_folders(root, tally.aside):
        parts = [os.path.splitext(name) for name in names]  # noqa: PTH122
        texts: dict[str, list[str]] = {}
        for stem, suffix in parts:
            if suffix in _TEXTS:
                texts.setdefault(stem, []).append(suffix)
        used = set()
        for stem, suffix in parts:
            if suffix.lower() in IMAGES:
                used.add(stem)
                tally.texts.update(texts.get(stem, ()))
                tally.images[folder.partition("/")[0]] += 1
                yield _image_row(f"{folder}{stem}{suffix}", kind, tuple(sorted(texts.get(stem, ()))))
            elif suffix not in _TEXTS:
                tally.aside[suffix or "file without a suffix"] += 1
        for stem in texts.keys() - used:
            tally.aside.update(f"{suffix} without an image" for suffix in texts[stem])


def _image_row(path: str, kind: str, siblings: tuple[str, ...]) -> Row:
    if kind != "classes":
        return Row(path, path, siblings=siblings)
    label = path.partition("/")[0] if "/" in path else None
    fault = None if label else ("bad-label", "the image lies in no class folder")
    return Row(path, path, label=label, siblings=siblings, fault=fault)
