"""A disk under test: its operations are counted, fail, run out of room, or are forgotten as by a power cut."""

import contextlib
import errno
import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import mmvit.checkpoint.sealed as sealed

MODES = ("once", "for ever", "killed")


class Killed(BaseException):
    """Stands for the end of the process: nothing that comes after it, no cleaning up either, gets to disk."""


class Disk:
    """What happens to the files below `root`, operation by operation, within a `with` block.

    Args:
        fatal: number, from 0, of the operation that fails; None: none does.
        mode: "once": with an error; "for ever": all later ones too; "killed": the process ends there.
        room: bytes that can still be written; None: any number.
    """

    def __init__(self, root: Path, fatal: int | None = None, mode: str = "once", room: int | None = None):
        self.root = str(root)
        self.fatal = fatal
        self.mode = mode
        self.room = room
        self.count = 0
        self.dead = False
        self.events: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def mounted(self) -> Iterator["Disk"]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "unlink", "rmdir", "chmod", "open"):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._wrapped_rename(getattr(os, name)))
            patch.setattr(os, "fsync", self._fsync)  # recorded, and not done: the machine stays up
            patch.setattr(io, "open", self._wrapped_open(io.open))
            patch.setattr(sealed, "save_file", self._wrapped_save(sealed.save_file))
            yield self

    def _step(self, error: Exception | None = None, torn: Callable[[], Any] = lambda: None) -> None:
        """Count an operation; where it is to fail, do the `torn` part of it and raise."""
        number, self.count = self.count, self.count + 1
        if self.dead or number == self.fatal:
            if not self.dead and self.mode == "killed":
                torn()
            self.dead = self.mode != "once"
            raise Killed if self.mode == "killed" else error or OSError(errno.EIO, os.strerror(errno.EIO))

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        fd = path if isinstance(path, int) else dir_fd
        full = str(Path.cwd() / path) if fd is None else str(Path(f"/proc/self/fd/{fd}").readlink())
        full += f"/{path}" if dir_fd is not None else ""
        return full if full == self.root or full.startswith(f"{self.root}/") else None

    def _wrapped(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        kind = {"mkdir": "mkdir", "unlink": "remove", "rmdir": "remove"}.get(name)

        def wrapped(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
            where = self._inside(path, dir_fd)
            if where:
                self._step()
            result = operation(path, *args, **({} if dir_fd is None else {"dir_fd": dir_fd}), **kwargs)
            if where and kind:
                self.events.append((kind, where))
            return result

        return wrapped

    def _wrapped_rename(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(source: Any, target: Any, **kwargs: Any) -> Any:
            old, new = self._inside(source), self._inside(target)
            if new:
                self._step()
            operation(source, target, **kwargs)
            if new:
                self.events.append(("rename", old, new))

        return wrapped

    def _fsync(self, fd: int) -> None:
        where = self._inside(fd)
        if where:
            self._step()
            self.events.append(("sync", where))

    def _wrapped_open(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            where = None if isinstance(path, int) else self._inside(path)
            if not where or mode[0] == "r":
                return operation(path, mode, *args, **kwargs)
            self._step()
            file = operation(path, mode, *args, **kwargs)
            self.events.append(("write", where, b""))
            return _File(file, self, where)

        return wrapped

    def _wrapped_save(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensors: Any, path: Path) -> None:
            self._step(SafetensorError("I/O error"), torn=lambda: path.write_bytes(b"half"))
            operation(tensors, path)
            missing = self.spend(path.stat().st_size)
            if missing:
                os.truncate(path, path.stat().st_size - missing)
                raise SafetensorError("I/O error: No space left on device")
            self.events.append(("write", str(path), path.read_bytes()))

        return wrapped

    def spend(self, num_bytes: int) -> int:
        """Take up room; returns how many bytes found none."""
        if self.room is None:
            return 0
        missing = max(0, num_bytes - self.room)
        self.room -= num_bytes - missing
        return missing


class _File:
    """A file open for writing, whose every write counts and reaches it at once."""

    def __init__(self, file: Any, disk: Disk, where: str):
        self.file, self.disk, self.where = file, disk, where

    def write(self, data: Any) -> int:
        self.disk._step(torn=lambda: self._write(data[: len(data) // 2]))
        missing = self.disk.spend(len(data))
        self._write(data[: len(data) - missing])
        if missing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def _write(self, data: Any) -> None:
        self.file.write(data)
        self.file.flush()
        self.disk.events.append(("write", self.where, Path(self.where).read_bytes()))

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Inode:
    """A file (its content) or a folder (its entries: name to inode number)."""

    def __init__(self, data: bytes | None):
        self.data = data
        self.entries: dict[str, int] = {}


class Platter:
    """Files as they stand on the disk itself, where a change that was not synced may or may not have arrived.

    A sync of a file covers its content, one of a folder its entries, and neither covers more: POSIX promises nothing
    else. A rename arrives whole or not at all.
    """

    def __init__(self, root: Path):
        """Take over the tree below `root`, all of it synced."""
        self.root = root
        self.inodes: list[Inode] = []
        self._read(root)

    def _read(self, path: Path) -> int:
        number = len(self.inodes)
        self.inodes.append(Inode(None if path.is_dir() else path.read_bytes()))
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self.inodes[number].entries[child.name] = self._read(child)
        return number

    def replay(self, events: list[tuple[Any, ...]], rng: random.Random, target: Path) -> None:
        """Write to `target` what may be left of the tree when the power goes after these events."""
        operations = self._resolved(events)
        for i, (kind, number, change) in enumerate(operations):
            if kind == "sync":
                continue
            synced = ("sync", number, None) in operations[i + 1 :]
            inode = self.inodes[number]
            if kind == "data" and not synced:
                inode.data = rng.choice([inode.data, change, change[: len(change) // 2], bytes(len(change))])
            elif kind == "data":
                inode.data = change
            elif synced or rng.random() < 0.5:
                for name, child in change.items():
                    inode.entries.pop(name, None)
                    if child is not None:
                        inode.entries[name] = child
        self._write(0, target)

    def _resolved(self, events: list[tuple[Any, ...]]) -> list[tuple[str, int, Any]]:
        """Turn paths into inode numbers, which renames do not change."""
        now = [dict(inode.entries) for inode in self.inodes]
        operations: list[tuple[str, int, Any]] = []

        def find(path: str) -> int:
            number = 0
            for part in Path(path).relative_to(self.root).parts:
                number = now[number][part]
            return number

        def enter(path: str, **entries: int | None) -> None:
            folder = find(str(Path(path).parent))
            for name, child in entries.items():
                now[folder].pop(name, None)
                if child is not None:
                    now[folder][name] = child
            operations.append(("entries", folder, entries))

        def make(path: str, data: bytes | None) -> int:
            self.inodes.append(Inode(data))
            now.append({})
            enter(path, **{Path(path).name: len(now) - 1})
            return len(now) - 1

        for kind, path, *rest in events:
            name = Path(path).name
            if kind == "mkdir":
                make(path, None)
            elif kind == "write":
                there = name in now[find(str(Path(path).parent))]
                operations.append(("data", find(path) if there else make(path, b""), rest[0]))
            elif kind == "rename":
                enter(path, **{name: None, Path(rest[0]).name: find(path)})
            elif kind == "remove":
                enter(path, **{name: None})
            else:
                operations.append(("sync", find(path), None))
        return operations

    def _write(self, number: int, path: Path) -> None:
        inode = self.inodes[number]
        if inode.data is not None:
            path.write_bytes(inode.data)
            return
        path.mkdir(exist_ok=True)
        for name, child in inode.entries.items():
            self._write(child, path / name)
