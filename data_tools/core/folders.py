"""Lists the images in a folder tree, without hidden files and links to folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Suffixes of files that can be read, and of other image files, which are known in order to report them.
READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
IMAGES = READABLE | {".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}


def is_readable(name: str) -> bool:
    """Return whether the name of a file ends in a suffix of `READABLE`, ignoring case."""
    return Path(name).suffix.lower() in READABLE


def walk_folders(root: Path, aside: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `root` (relative to it, "" for itself) with its files, all sorted.

    Links to folders are not followed: they are counted in `aside`, as are hidden files and folders.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        names, folders = [], []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    aside["hidden"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{entry.name}/")
                elif entry.is_dir():
                    aside["link to a folder"] += 1
                else:
                    names.append(entry.name)
        yield folder, sorted(names)
        waiting += sorted(folders, reverse=True)


def image_files(root: Path) -> list[Path]:
    """Return the readable images in a folder and in the folders below it, sorted by path."""
    folders = walk_folders(root, Counter())
    return sorted(root / folder / name for folder, names in folders for name in names if is_readable(name))
