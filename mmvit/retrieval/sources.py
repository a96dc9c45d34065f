"""Where the pictures and texts to embed come from."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.errors import UsageError
from data_tools.expand import expand_shards
from mmvit.data.shards import IndexedShards

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Item(NamedTuple):
    """One thing to embed; `image` and `caption` are None where the source has none."""

    key: str
    image: bytes | None
    caption: str | None
    meta: dict[str, Any]


class ShardSource:
    """The samples of WebDataset shards."""

    def __init__(self, paths: Sequence[Path]):
        self.shards = IndexedShards(paths)

    def __len__(self) -> int:
        return len(self.shards)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Read a range of samples."""
        for i in range(start, stop):
            sample = self.shards.read(i)
            yield Item(sample.key, sample.image, sample.caption, sample.meta or {})

    def fingerprint(self) -> str:
        """Name the content."""
        return self.shards.fingerprint()


class FileSource:
    """Picture files."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Read a range of files."""
        for path in self.files[start:stop]:
            yield Item(str(path), path.read_bytes(), None, {})

    def fingerprint(self) -> str:
        """Name the content by paths, sizes and times."""
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return str(facts)


class LineSource:
    """The lines of a text file."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Read a range of lines."""
        for i in range(start, min(stop, len(self.lines))):
            yield Item(f"{self.path.name}:{i + 1}", None, self.lines[i], {})

    def fingerprint(self) -> str:
        """Name the content."""
        return "\n".join(self.lines)


Source = ShardSource | FileSource | LineSource


def open_source(spec: str) -> Source:
    """Open shards, a folder of pictures, one picture, or a text file with a text a line.

    Raises:
        UsageError: nothing there can be embedded.
    """
    path = Path(spec)
    if path.is_dir() and not any(path.glob("*.tar")):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UsageError("the folder holds no shard and no picture", where=spec, mend="give another SOURCE")
        return FileSource(files)
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        return FileSource([path])
    if path.suffix == ".txt" and path.is_file():
        return LineSource(path)
    return ShardSource(expand_shards(spec))
