"""Where the images and texts to embed come from."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.core.errors import DataError, UsageError
from data_tools.core.files import UnreadableError, read_regular
from data_tools.core.folders import is_readable, list_images
from data_tools.core.names import store_name
from data_tools.tar.expand import expand_shards
from data_tools.tar.location import LocationLike, without_secrets
from mmvit.data.shards import IndexedShards

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """One thing to embed; `image` and `caption` are None where the source has none."""

    key: str
    image: bytes | None
    caption: str | None
    meta: dict[str, Any]


class ShardSource:
    """The samples of WebDataset shards."""

    modality = "both"

    def __init__(self, paths: Sequence[LocationLike]):
        self.shards = IndexedShards(paths, require_caption=False)

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, i: int) -> str:
        """Name a sample."""
        return self.shards.key(i)

    def read(self, i: int) -> Item:
        """Read a sample; raises DataError where it is damaged."""
        sample = self.shards.read(i)
        return Item(sample.key, sample.image, sample.caption or None, sample.meta or {})

    def fingerprint(self) -> str:
        """Name the content."""
        return self.shards.fingerprint()


class FileSource:
    """Image files; their keys are paths as `store_name` writes them, because parquet takes valid text alone."""

    modality = "image"

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        """Name a file."""
        return store_name(str(self.files[i]))

    def read(self, i: int) -> Item:
        """Read a file; raises DataError where that fails. What is no regular file is not opened."""
        try:
            return Item(self.key(i), read_regular(self.files[i]), None, {})
        except UnreadableError as error:
            raise DataError(f"image cannot be read: {error.what}", where=self.key(i)) from error

    def fingerprint(self) -> str:
        """Name the content by paths, sizes and times."""
        return str([(str(path), *_size_and_time(path)) for path in self.files])


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # reported when it is read
        return -1, -1
    return status.st_size, status.st_mtime_ns


class LineSource:
    """The lines of a text file that are not blank."""

    modality = "text"

    def __init__(self, path: Path):
        self.path = path
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UsageError("the file is not UTF-8 text", where=f"{path}, byte {error.start}") from error
        self.lines = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        if not self.lines:
            raise UsageError("the file contains no text", where=str(path), hint="write one text per line")

    def __len__(self) -> int:
        return len(self.lines)

    def key(self, i: int) -> str:
        """Name a line."""
        return f"{self.path.name}:{self.lines[i][0]}"

    def read(self, i: int) -> Item:
        """Return a line."""
        return Item(self.key(i), None, self.lines[i][1], {})

    def fingerprint(self) -> str:
        """Name the content."""
        return str(self.lines)


Source = ShardSource | FileSource | LineSource


def open_source(spec: str) -> Source:
    """Open shards, a folder of images, one image, or a text file with one text per line.

    Raises:
        UsageError: nothing there can be embedded.
        DataError: a file is missing, or no shard is found.
    """
    path = Path(spec)
    if path.is_dir() and not any(path.glob("*.tar")):
        files, skipped = list_images(path)
        if not files:
            raise UsageError(
                "the folder contains neither shards nor images",
                where=spec,
                note=skipped,
                hint="pass shards, images or a .txt file",
            )
        if skipped:
            logger.warning("%s: %s", spec, skipped)
        return FileSource(files)
    is_text = path.suffix.lower() == ".txt"
    if (is_readable(path.name) or is_text) and not path.is_file():
        what = "it is not a file" if path.exists() else "the file is missing"
        hint = "check the path; for several images pass their folder"
        raise DataError(what, where=without_secrets(spec), hint=hint)
    if is_readable(path.name):
        return FileSource([path])
    return LineSource(path) if is_text else ShardSource(expand_shards(spec))
