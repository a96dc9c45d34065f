"""Lists the images in a folder tree, without hidden files and links to folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from data_tools.core.errors import DataError

# Suffixes of files that can be read, and of other image files, which are known in order to report them.
READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
IMAGES = READABLE | {".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}

_SHOWN = 8  # kinds of skipped files
_CONTAINERS = {
    *("data", "dataset", "datasets", "raw", "jpg", "jpgs", "jpeg", "jpegs", "png", "pngs", "webp", "all"),
    *("images", "image", "imgs", "img", "photos", "photo", "pictures", "picture", "pics", "files", "samples"),
}
_CONTAINER_ENDS = ("images", "imgs", "photos", "pictures", "dataset")  # PetImages, flickr30k_images, JPEGImages
_VERSION = re.compile(r"[\d _.-]*$")  # of train2017, images_001


def is_readable(name: str) -> bool:
    """Return whether the name of a file ends in a suffix of `READABLE`, ignoring case."""
    return Path(name).suffix.lower() in READABLE


def walk_folders(root: Path, aside: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `root` (relative to it, "" for itself) with its files, all sorted.

    Links to folders are not followed: they are counted in `aside`, as are hidden files and folders. A link that leads
    nowhere and a special file (pipe, socket, device) are among the files; nothing is opened.

    Raises:
        DataError: a folder cannot be listed.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        names, folders = [], []
        for entry in _entries(root / folder):
            if entry.name.startswith("."):
                aside["hidden"] += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}{entry.name}/")
            elif _leads_to_folder(entry):
                aside["link to a folder"] += 1
            else:
                names.append(entry.name)
        yield folder, sorted(names)
        waiting += sorted(folders, reverse=True)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        hint = "check its permissions, or that nobody moves it meanwhile"
        raise DataError(f"the folder cannot be listed: {error.strerror}", where=str(folder), hint=hint) from error


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be read: reported as a file that is none
        return False


def image_files(root: Path, aside: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `root` as `walk_folders` does, with its readable images; `aside` counts all other files.

    Files are counted by their suffix.
    """
    for folder, names in walk_folders(root, aside):
        images = [name for name in names if is_readable(name)]
        count_others((name for name in names if not is_readable(name)), aside)
        yield folder, images


def list_images(root: Path) -> tuple[list[Path], str]:
    """Return the readable images in a folder and in the folders below it, sorted, and what was skipped."""
    aside: Counter[str] = Counter()
    files = sorted(root / folder / name for folder, names in image_files(root, aside) for name in names)
    return files, describe_skipped(aside)


def count_others(names: Iterable[str], aside: Counter[str]) -> None:
    """Count files that are not used by their suffix."""
    aside.update(Path(name).suffix or "file without a suffix" for name in names)


def describe_skipped(aside: Counter[str]) -> str:
    """Return "skipped: 3 x .txt, 1 x hidden", the most frequent first; "" if nothing was skipped."""
    found = [f"{count} x {what}" for what, count in aside.most_common(_SHOWN) if count]
    more = sum(aside.values()) - sum(count for _, count in aside.most_common(_SHOWN))
    return "skipped: " + ", ".join([*found, *([f"{more} others"] if more else [])]) if found else ""


def doubtful_class(folder: str) -> str:
    """Return why a folder is hardly a class of images by its name; "" if it may be one.

    Parts of a data set (train, val2017) and mere containers (images, PetImages) are doubtful.
    """
    stem = _VERSION.sub("", folder.lower())
    if stem in SPLITS:
        return f"the folder {folder!r} is a part of a data set, not a class"
    if stem in _CONTAINERS or stem.endswith(_CONTAINER_ENDS):
        return f"the folder {folder!r} is not a class by its name"
    return ""


def doubtful_classes(folders: Collection[str]) -> str:
    """Return why folders of these names are hardly the classes of images, of which there are two at least; or ""."""
    doubts = filter(None, map(doubtful_class, sorted(folders)))
    return next(doubts, f"there is only one class folder, {min(folders)!r}" if len(folders) == 1 else "")
