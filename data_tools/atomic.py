"""Files and folders that appear whole or not at all: built beside their final name, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import UsageError


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


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """Return `.NAME.tmp-PID` in the folder of `path`: the name under which `path` is built."""
    final = Path(path)
    return final.with_name(f".{final.name}.tmp-{os.getpid()}")


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


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        UsageError: one of them is a file, or cannot be made in this place.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        where = os.fspath(path)
        raise UsageError("the folder cannot be made", where=where, mend="choose another folder") from error


def check_output_file(path: Path, suffix: str = "") -> None:
    """Make the folder of a file that long work will write at its end, so that no work is lost to a wrong name.

    Raises:
        UsageError: `path` is a folder, has another suffix, or its folder cannot be made.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise UsageError("the file to write is a folder", where=str(path), mend=f"{path / ('NAME' + suffix)}")
    if suffix and path.suffix.lower() != suffix:
        raise UsageError(f"the file is written as {suffix}", where=str(path), mend=str(path.with_suffix(suffix)))


@contextlib.contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `final`; on success sync every file and rename it, on an exception remove it.

    `final` must not exist yet, or be an empty folder: a full folder is never overwritten.

    Raises:
        UsageError: `final` exists and is not an empty folder (raised before anything is written).
    """
    target = Path(final).absolute()
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UsageError(
            "the output folder exists and is not empty",
            where=str(target),
            meaning="nothing was written or overwritten",
            mend="choose another folder, or remove this one",
        )
    make_folder(target.parent)
    temporary = temporary_name(target)
    if temporary.exists():  # left by a killed process whose number came again
        shutil.rmtree(temporary)
    make_folder(temporary)
    try:
        yield temporary
        _fsync_tree(temporary)
        rename_synced(temporary, target)  # POSIX rename replaces an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fsync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_file(Path(root, name))
        fsync_dir(root)
