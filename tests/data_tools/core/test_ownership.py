"""A folder has one writer at a time, until it ends or dies."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_tools.core.errors import UsageError
from data_tools.core.ownership import OWNER, owned

# Owns a folder, with a forked child and a started program that outlive it, until it is killed or told to end.
WRITER = """
import os, subprocess, sys, time
from data_tools.core.ownership import owned
with owned(sys.argv[1], replaced=sys.argv[2] == "replaced"):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    program = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(child, program.pid, flush=True)
    sys.stdin.read()
"""


Writer = Callable[..., tuple["subprocess.Popen[str]", list[int]]]


@pytest.fixture
def start_writer() -> Iterator[Writer]:
    """Start a writer; it and what it started do not outlive the test."""
    writers, children = [], []

    def start(folder: Path, how: str = "in place") -> tuple["subprocess.Popen[str]", list[int]]:
        command = [sys.executable, "-c", WRITER, str(folder), how]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        writers.append(writer)
        assert writer.stdout is not None
        started = [int(word) for word in writer.stdout.readline().split()]
        children.extend(started)
        return writer, started

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for writer in writers:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.kill()
        writer.wait(60)
        writer.stdin.close()
        writer.stdout.close()


def refused(folder: Path, *, replaced: bool = False) -> UsageError:
    with pytest.raises(UsageError, match="being written by") as caught, owned(folder, replaced=replaced):
        pass
    return caught.value


def test_second_writer_is_refused_and_a_killed_owner_holds_nothing(start_writer: Writer, tmp_path: Path):
    folder = tmp_path / "run"
    writer, children = start_writer(folder)
    (folder / "work").write_text("of the first")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    error = refused(folder)
    assert error.exit_code == 2
    assert f"process {writer.pid} on {socket.gethostname()}, since 20" in error.what
    assert error.where == str(folder)
    assert sys.executable in error.note
    refused(tmp_path / "." / "run" / ".." / "run")
    (tmp_path / "link").symlink_to(folder)
    refused(tmp_path / "link")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    writer.kill()
    assert writer.wait(60) == -signal.SIGKILL
    for child in children:
        os.kill(child, 0)  # they live
    with owned(folder):
        assert json.loads((folder / OWNER).read_text())["pid"] == os.getpid()
    assert [path.name for path in folder.iterdir()] == ["work"]


def test_folder_that_appears_as_a_whole_has_one_writer_too(start_writer: Writer, tmp_path: Path):
    writer, _ = start_writer(tmp_path / "model", "replaced")
    assert not (tmp_path / "model").exists()
    refused(tmp_path / "model", replaced=True)
    refused(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert writer.stdin is not None
    writer.stdin.close()
    assert writer.wait(60) == 0
    with owned(tmp_path / "model", replaced=True), owned(tmp_path / "other", replaced=True):
        (tmp_path / "model").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_thread_owns_again_another_one_does_not(tmp_path: Path):
    with owned(tmp_path), ThreadPoolExecutor(1) as pool:
        with owned(tmp_path):
            pass
        error = pool.submit(refused, tmp_path).result()
        assert f"process {os.getpid()} on {socket.gethostname()}, this one" in error.what
        assert (tmp_path / OWNER).exists()
    assert not list(tmp_path.iterdir())


def test_folder_without_content_is_removed_at_the_end(tmp_path: Path):
    with owned(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with owned(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_owner_that_ends_between_opening_and_locking_leaves_no_lock_on_a_removed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lock, calls = fcntl.flock, []

    def locked(fd: int, how: int) -> None:
        if not calls:
            (tmp_path / OWNER).unlink()  # the end of the other owner
        calls.append(fd)
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert len(calls) == 2


def test_many_writers_never_meet(tmp_path: Path):
    inside, met, turns = [0], [0], [0]

    def write() -> None:
        for _ in range(60):
            try:
                with owned(tmp_path / "run"):
                    inside[0] += 1
                    met[0] += inside[0] > 1
                    turns[0] += 1
                    inside[0] -= 1
            except UsageError:
                pass

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [0]
    assert turns[0] >= 60
    assert not list(tmp_path.rglob(OWNER))


def test_without_locks_a_living_process_of_this_machine_is_the_owner(
    start_writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    writer, _ = start_writer(tmp_path)
    assert f"process {writer.pid}" in refused(tmp_path).what
    writer.kill()
    writer.wait(60)
    for _ in range(2):
        with owned(tmp_path):
            pass
    assert capsys.readouterr().err.count("the file system has no locks") == 1
