"""Ownership of a folder: one writer at a time, until it ends or dies.

The owner holds the file system's own lock (`flock`) on a small file that names it. The kernel releases the lock when
the owner dies, so that a file left behind has no effect. On a shared disk the lock holds across machines if the file
system passes `flock` on: NFS version 4 (or 3 with lockd), Lustre mounted with `flock`, GPFS, CephFS. Where locks are
not supported, a warning is printed, and only a living process of the same machine counts as an owner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.core.errors import UsageError
from data_tools.core.files import make_folder

OWNER = ".owner"  # in a folder; of a folder that appears as a whole: .NAME.owner next to it
MAX_COMMAND = 200  # characters
_READ_S = 0.5  # time that an owner may take between its lock and its name
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class _Held(NamedTuple):
    fd: int
    thread: int


_held: dict[str, _Held] = {}  # by the real path of the lock file
_warned: set[Path] = set()


@contextlib.contextmanager
def owned(folder: str | os.PathLike[str], *, replaced: bool = False) -> Iterator[None]:
    """Own a folder within the block; it is created, and removed again at the end if nothing was written to it.

    The thread that owns a folder may own it again, as a verb does that calls another one.

    Args:
        folder: the folder to write.
        replaced: the folder will appear as a whole, by a rename: it is neither created nor written in the block.

    Raises:
        UsageError: another process or thread owns it.
    """
    real = Path(os.path.realpath(folder))
    beside = real.parent / f".{real.name}{OWNER}"
    path = beside if replaced else real / OWNER
    held = _held.get(str(path))
    if held is not None and held.thread == threading.get_ident():
        yield
        return
    made = _make(path.parent)
    try:
        if not replaced and os.path.exists(beside):  # noqa: PTH110 - a name may be too long
            os.close(_take(beside, real, create=False))
        fd = _take(path, real)
        _held[str(path)] = _Held(fd, threading.get_ident())
        try:
            yield
        finally:
            if _held.pop(str(path), None):  # else this is a forked process, which owns nothing
                path.unlink(missing_ok=True)  # before the lock is released: see `_take`
                os.close(fd)
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it is not empty
                each.rmdir()


def _make(folder: Path) -> list[Path]:
    """Create a folder and return what was missing, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    return missing


def _take(path: Path, folder: Path, *, create: bool = True) -> int:
    """Lock the file, name this process in it, and return its descriptor.

    An owner that ends removes the file and then releases it: whoever locked the removed file tries again.
    """
    while True:
        try:
            # Not inherited by programs that this process starts; `_release_in_child` closes it in forked processes.
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
        except FileNotFoundError:
            if not create:
                return os.open(os.devnull, os.O_RDONLY)  # the other owner has just ended
            make_folder(path.parent)  # removed by an owner that wrote nothing
            continue
        try:
            locked = _lock(fd, path)
            if not locked:
                raise _refusal(_read(fd), folder)
            if _is_at(fd, path):
                if create:
                    _write(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, path: Path) -> bool:
    """Return whether this process has the lock now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        owner = _read(fd, wait=False)
        if _lives_here(owner):
            return False
        if path not in _warned:
            _warned.add(path)
            what = f"the file system has no locks ({error.strerror}): writers on other machines are not detected"
            print(f"{what}\n  where: {path}", file=sys.stderr)
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _write(fd: int) -> None:
    shown = ["..." if "://" in word else word for word in sys.orig_argv]  # an address may hold a secret
    command = shlex.join(shown)[:MAX_COMMAND]
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": started, "command": command}
    os.truncate(fd, 0)
    os.pwrite(fd, json.dumps(owner | {"birth": _birth(os.getpid())}).encode(), 0)


def _read(fd: int, *, wait: bool = True) -> dict[str, Any]:
    """Return what the owner says of itself; empty if it does not."""
    limit = time.monotonic() + (_READ_S if wait else 0)
    while True:
        with contextlib.suppress(ValueError):
            owner = json.loads(os.pread(fd, 4096, 0))
            return owner if isinstance(owner, dict) else {}
        if time.monotonic() >= limit:
            return {}
        time.sleep(0.01)


def _lives_here(owner: dict[str, Any]) -> bool:
    """Return whether the owner is a living process of this machine, and not a later one with its number."""
    birth = owner.get("birth")
    return owner.get("host") == socket.gethostname() and birth is not None and _birth(owner.get("pid")) == birth


def _birth(pid: object) -> str | None:
    """Return when a process of this machine started, in ticks since the machine did; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class Owner(NamedTuple):
    """Who writes a folder, as its owner file says; `alive` is None for a process of another machine."""

    pid: int
    host: str
    started: str
    command: str
    alive: bool | None


def owner_of(folder: str | os.PathLike[str]) -> Owner | None:
    """Return who writes a folder or wrote it until it died; None if it ended. The lock is not touched."""
    try:
        owner = json.loads((Path(folder) / OWNER).read_text("utf-8"))
        here = owner["host"] == socket.gethostname()
        alive = _lives_here(owner) if here else None
        return Owner(int(owner["pid"]), str(owner["host"]), str(owner["started"]), str(owner["command"]), alive)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _refusal(owner: dict[str, Any], folder: Path) -> UsageError:
    pid, host = owner.get("pid", "?"), owner.get("host", "?")
    mine = pid == os.getpid() and host == socket.gethostname()
    who = f"process {pid} on {host}" + (", this one" if mine else "")
    return UsageError(
        f"the folder is being written by {who}, since {owner.get('started', '?')}",
        where=folder,
        note=f"nothing was started or changed; the other command is: {owner.get('command', '?')}",
        hint="wait until it ends, or stop it, or choose another folder",
    )


def _release_in_child() -> None:
    """Close the locks in a forked process, which would hold them beyond the death of the owner."""
    for held in _held.values():
        os.close(held.fd)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
