"""The disk fills up in a save: nothing earlier is lost, nothing half done has a final name, the message has bytes."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from disk import Disk
from saves import CRASHING, save, set_up, step_of, tensors

import mmvit.checkpoint.sealed as checkpoint
from data_tools.core.errors import ResourceError
from mmvit.train.record.saver import Saver


class Usage(NamedTuple):
    free: int


def num_bytes(name: str, folder: Path) -> int:
    """Count what a save writes."""
    run = folder / "measured"
    scene = set_up(name, run)
    with Disk(run, room=10**9).mounted() as disk:
        scene.act(run)
    return 10**9 - (disk.room or 0)


def fill(name: str, folder: Path, num_budgets: int) -> None:
    total = num_bytes(name, folder)
    for i in range(num_budgets):
        run, room = folder / str(i), i * total // num_budgets
        scene = set_up(name, run)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with Disk(run, room=room).mounted(), pytest.raises(ResourceError) as error:
            scene.act(run)
        assert error.value.exit_code == 5
        assert re.search(r"it needs [\d,]+ bytes, and [\d,]+ are free; nothing .* is lost", error.value.note)
        assert "free some space" in error.value.hint
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        assert scene.seen(run) == scene.old
        scene.after(run)
        assert scene.seen(run) == scene.last
        shutil.rmtree(run)


WITHOUT_DAMAGE = [name for name in CRASHING if "damaged" not in name]  # which goes to make room


@pytest.mark.usefixtures("quick_saves")
@pytest.mark.parametrize("name", WITHOUT_DAMAGE)
def test_disk_that_fills_up_keeps_what_was_there(name: str, tmp_path: Path):
    fill(name, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_saves")
@pytest.mark.parametrize("name", WITHOUT_DAMAGE)
def test_disk_that_fills_up_at_each_of_200_places(name: str, tmp_path: Path):
    fill(name, tmp_path, 200)


@pytest.mark.parametrize("name", WITHOUT_DAMAGE)
def test_nothing_is_begun_that_does_not_fit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scene = set_up(name, tmp_path / "run")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(512))
    with Disk(tmp_path / "run", fatal=3, mode="for ever").mounted(), pytest.raises(ResourceError) as error:
        scene.act(tmp_path / "run")  # no operation but that the folder is made
    assert "No space left on device" in error.value.what
    assert "and 512 are free" in error.value.note
    assert scene.seen(tmp_path / "run") == scene.old


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=65536", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


@pytest.mark.parametrize("told", [True, False], ids=["free space is known", "quota that nobody knows"])
def test_real_small_disk(small_disk: Path, told: bool, monkeypatch: pytest.MonkeyPatch):
    saver = Saver(small_disk, keep_last=100)
    if not told:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(10**9))
    else:
        monkeypatch.setattr(checkpoint, "SLACK", 0)
    step, error = 0, None
    while error is None and step < 100:
        step += 1
        error = error_in_thread(saver, step)
    assert error is not None
    assert "No space left on device" in error.what
    assert error.exit_code == 5
    assert step > 2
    assert step_of(small_disk) == step - 1
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir())[-1] == f"step-{step - 1:08d}"
    shutil.rmtree(small_disk / "checkpoints" / "step-00000001")
    save(small_disk, step, keep_last=100)  # as the message says: with room, it goes on
    assert step_of(small_disk) == step


def error_in_thread(saver: Saver, step: int) -> ResourceError | None:
    saver.save(step, tensors(step), {"step": step})
    try:
        saver.wait()
    except ResourceError as error:
        return error
    return None
