"""Files that appear whole or not at all: built next to their final name, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from data_tools.core.errors import UsageError

# Containers that share a disk count their processes alike, so a number alone does not name one.
_TOKEN = secrets.token_hex(4)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Force the content of one file to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Force the entries of one folder (names made, renamed, removed) to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: str | os.PathLike[str]) -> None:
    """Force a folder and all that is in it to disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_file(Path(root, name))
        fsync_dir(root)


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """Return `.NAME.tmp-PROCESS` in the folder of `path`: the name under which this process builds `path`."""
    final = Path(path)
    return final.with_name(f".{final.name}.tmp-{os.getpid()}-{_TOKEN}")


def rename_synced(temporary: Path, final: Path) -> None:
    """Give a finished, synced file or folder its final name and make the rename durable."""
    temporary.replace(final)
    fsync_dir(final.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`; a reader sees the old content or the new, never a part, also after a power cut."""
    final = Path(path)
    temporary = temporary_name(final)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename_synced(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder; after a crash it is whole, gone, or hidden under a name for `remove_leftovers`."""
    hidden = temporary_name(folder)
    shutil.rmtree(hidden, ignore_errors=True)
    rename_synced(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed processes left of files and folders called `name`, a pattern, that nobody builds now."""
    for path in folder.glob(f".{name}.tmp-*"):  # what cannot be removed harms nothing
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those above it, unless it is there; what is made survives a power cut.

    Raises:
        UsageError: one of them is a file, or cannot be made in this place.
    """
    folder = Path(path)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for made in reversed(missing):
            fsync_dir(made.parent)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        where = os.fspath(path)
        raise UsageError("the folder cannot be made", where=where, hint="choose another folder") from error


def check_output_file(path: Path, suffix: str = "") -> None:
    """Make the folder of a file that long work will write at its end, so that no work is lost to a wrong name.

    Raises:
        UsageError: `path` is a folder, has another suffix, or its folder cannot be made.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise UsageError("the file to write is a folder", where=str(path), hint=f"{path / ('NAME' + suffix)}")
    if suffix and path.suffix.lower() != suffix:
        raise UsageError(f"the file is written as {suffix}", where=str(path), hint=str(path.with_suffix(suffix)))
