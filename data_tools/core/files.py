"""Atomic writes of files: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from pathlib import Path

from data_tools.core.errors import UsageError

# Containers that share a disk can have equal process ids, so a process id alone is not unique.
_TOKEN = secrets.token_hex(4)
_MAX_BYTES = 512 << 20  # no image that may be decoded is larger


class UnreadableError(Exception):
    """Raised for a file that cannot be read; `cause` is its name in `errors.CAUSES`."""

    def __init__(self, cause: str, what: str):
        super().__init__(what)
        self.cause = cause
        self.what = what


def read_regular(path: str | os.PathLike[str], max_bytes: int = _MAX_BYTES) -> bytes:
    """Return the content of a file, links followed; pipes, sockets and devices are never opened.

    Raises:
        UnreadableError: it is missing, is not a regular file, is larger than `max_bytes`, or cannot be read.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (also of a str)
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise UnreadableError("no-image", f"it is not a file but {kind}")
        if status.st_size > max_bytes:
            raise UnreadableError("too-large", f"it has {status.st_size} bytes, more than {max_bytes}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnreadableError("no-image", f"the file cannot be read: {reason}") from error


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Flush the content of one file to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Flush the entries of one folder (created, renamed and removed names) to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: str | os.PathLike[str]) -> None:
    """Flush a folder and its content to disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_file(Path(root, name))
        fsync_dir(root)


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """Return `.NAME.tmp-PROCESS` in the folder of `path`: the temporary name under which this process writes `path`."""
    final = Path(path)
    return final.with_name(f".{final.name}.tmp-{os.getpid()}-{_TOKEN}")


def rename_synced(temporary: Path, final: Path) -> None:
    """Rename a finished, synced file or folder to its final name and make the rename durable."""
    temporary.replace(final)
    fsync_dir(final.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically: readers see the old or the new content, even after a power failure."""
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
    """Remove a folder; after a crash it is intact, gone, or hidden under a name that `remove_leftovers` removes."""
    hidden = temporary_name(folder)
    shutil.rmtree(hidden, ignore_errors=True)
    rename_synced(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files and folders of `name`, a pattern, left by killed processes; nobody may be writing it."""
    for path in folder.glob(f".{name}.tmp-*"):  # a leftover that cannot be removed is harmless
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder and its parents if they do not exist, durably.

    Raises:
        UsageError: one of them is a file, or cannot be created here.
    """
    folder = Path(path)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for made in reversed(missing):
            fsync_dir(made.parent)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        where = os.fspath(path)
        raise UsageError("the folder cannot be created", where=where, hint="choose another folder") from error


def check_output_file(path: Path, suffix: str = "") -> None:
    """Check an output path before long work and create its folder, so that no work is lost to a wrong name.

    Raises:
        UsageError: `path` is a folder, has another suffix, or its folder cannot be created.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise UsageError("the output file is a folder", where=str(path), hint=f"{path / ('NAME' + suffix)}")
    if suffix and path.suffix.lower() != suffix:
        raise UsageError(f"the output file must be a {suffix}", where=str(path), hint=str(path.with_suffix(suffix)))
