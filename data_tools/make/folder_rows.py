"""Rows of a folder of images: with texts of the same name next to them, or in one folder a class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.core.folders import IMAGES, count_others, walk_folders
from data_tools.make.row import Row

TABLES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

_TEXTS = (".txt", ".json")
_NO_CAPTIONS = ("readme", "license", "licence", "copying", "notice", "changelog", "citation", "classes", "classnames")


class Looks(NamedTuple):
    """What a folder looks like by the names of its files.

    Args:
        kind: "folder" for images with texts, or right in the folder, else "classes".
        has_texts: an image has a text.
        folders: those of the top that hold images.
        tables: files that may hold the captions of other images.
    """

    kind: str
    has_texts: bool
    folders: tuple[str, ...]
    tables: tuple[str, ...]


def look_at(path: Path) -> Looks:
    """Look through a folder, without opening a file."""
    top: dict[str, None] = {}
    tables: list[str] = []
    has_texts = False
    for folder, names in walk_folders(path, Counter()):
        images, others = _match_texts(names)
        has_texts |= any(images.values())
        top |= dict.fromkeys([folder.partition("/")[0]] if images else [])
        tables += [f"{folder}{name}" for name in others if may_hold_captions(name)]
    kind = "folder" if has_texts or "" in top else "classes"
    return Looks(kind, has_texts, tuple(top), tuple(tables))


class Tally(NamedTuple):
    """What a folder holds besides rows.

    Args:
        aside: files that give no row, by what they are.
        texts: texts next to images, by suffix.
        images: images in each folder of the top.
        tables: files that may hold the captions of other images: tables, and texts without an image.
    """

    aside: Counter[str]
    texts: Counter[str]
    images: Counter[str]
    tables: list[str]


def image_rows(root: Path, kind: str, tally: Tally) -> Iterator[Row]:
    """Yield a row for each image, and count what was found."""
    for folder, names in walk_folders(root, tally.aside):
        images, others = _match_texts(names)
        for name, siblings in images.items():
            tally.texts.update(_kind_of_text(text) for text in siblings)
            tally.images[folder.partition("/")[0]] += 1
            yield _image_row(f"{folder}{name}", kind, siblings)
        alone = [name for name in others if _kind_of_text(name)]
        tally.aside.update(f"{_kind_of_text(name)} without an image" for name in alone)
        count_others((name for name in others if not _kind_of_text(name)), tally.aside)
        tally.tables.extend(f"{folder}{name}" for name in others if may_hold_captions(name))


def may_hold_captions(name: str) -> bool:
    """Return whether a file may hold the captions of images by its name: a table or a text, but no README."""
    return Path(name).suffix.lower() in {*TABLES, *_TEXTS} and not name.lower().startswith(_NO_CAPTIONS)


def _kind_of_text(name: str) -> str:
    """Return ".txt" or ".json", whatever the case of the suffix; "" for other files."""
    return next((suffix for suffix in _TEXTS if name.lower().endswith(suffix)), "")


def _match_texts(names: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the images, each with its texts, and the other files.

    A text is called like its image, with or without the image's suffix: `1.txt`, `1.TXT` or `1.jpg.txt` for `1.jpg`.
    It is given by what follows the stem of the image.
    """
    texts: dict[str, list[str]] = {}  # by all that stands before .txt or .json
    for name in names:
        if _kind_of_text(name):
            texts.setdefault(os.path.splitext(name)[0], []).append(name)  # noqa: PTH122 (of a name, many times)
    images: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for name in names:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() in IMAGES:
            own = [*texts.get(stem, ()), *texts.get(name, ())]
            used.update(own)
            images[name] = tuple(sorted(text[len(stem) :] for text in own))
    return images, [name for name in names if name not in images and name not in used]


def _image_row(path: str, kind: str, siblings: tuple[str, ...]) -> Row:
    read = _TEXTS if kind != "classes" else (".json",)
    fault = None
    for suffix in read:
        same = [Path(path).stem + text for text in siblings if _kind_of_text(text) == suffix]
        if len(same) > 1:
            fault = ("double-field", f"it is not known which file belongs to the image: {' or '.join(same)}")
    if kind != "classes":
        return Row(path, path, siblings=siblings, fault=fault)
    label = path.partition("/")[0] if "/" in path else None
    if not label:
        fault = ("bad-label", "the image lies in no class folder")
    return Row(path, path, label=label, siblings=siblings, fault=fault)
