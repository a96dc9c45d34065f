"""Files and folders are written atomically."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.core import files as atomic
from data_tools.core.errors import UsageError
from data_tools.core.output_folder import atomic_folder


def test_write_atomic_replaces(tmp_path: Path):
    atomic.write_atomic(tmp_path / "a", b"old")
    atomic.write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_write_atomic_keeps_the_old_file_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    atomic.write_atomic(tmp_path / "a", b"old")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic.write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_atomic_folder_appears_at_the_end(tmp_path: Path):
    final = tmp_path / "deep" / "out"
    with atomic_folder(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
        assert not final.exists()
        assert folder.name.startswith(".out.tmp-")
        assert folder.parent == final.parent
    assert (final / "sub" / "a").read_text() == "x"
    assert [path.name for path in final.parent.iterdir()] == ["out"]


def test_atomic_folder_syncs_every_file_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    monkeypatch.setattr(atomic, "fsync_file", lambda path: synced.append(Path(path).name))
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("x")
    assert sorted(synced) == ["a", "b"]


def test_atomic_folder_leaves_nothing_after_an_exception(tmp_path: Path):
    def build() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_refuses_a_full_folder_and_takes_an_empty_one(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("mine")
    with pytest.raises(UsageError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "mine"


def test_temporary_names_differ_between_processes_of_one_number(tmp_path: Path):
    code = "import os, sys; os.getpid = lambda: 7; from data_tools.core.files import temporary_name as t; print(t('a'))"
    names = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(names) == 2
    assert atomic.temporary_name("a") == atomic.temporary_name("a")  # one process finds its own again


def test_made_folders_are_synced_up_to_the_first_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "fsync_dir", synced.append)
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_folder_is_hidden_before_it_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("x")

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            atomic.remove_folder(folder)
    (hidden,) = tmp_path.iterdir()
    assert hidden.name.startswith(".out.tmp-")
    (tmp_path / ".other.tmp-1").touch()
    atomic.remove_leftovers(tmp_path, "out")
    assert [path.name for path in tmp_path.iterdir()] == [".other.tmp-1"]
    atomic.remove_leftovers(tmp_path, "*")
    assert list(tmp_path.iterdir()) == []
