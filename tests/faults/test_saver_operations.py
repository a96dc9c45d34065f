"""Every file operation of a save fails in turn, once, for ever, or as the last one of the process."""

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from disk import MODES, Disk, Killed
from saves import CRASHING, SCENES, save, set_up, step_of

from data_tools.core.errors import ResourceError

pytestmark = pytest.mark.usefixtures("quick_saves")


def num_operations(name: str, folder: Path) -> int:
    run = folder / "counted"
    scene = set_up(name, run)
    with Disk(run).mounted() as disk:
        scene.act(run)
    assert scene.seen(run) == scene.new
    return disk.count


def disturbed(act: Callable[[Path], object], run: Path, fatal: int, mode: str) -> bool:
    """Act on a disk that fails there; returns whether the save said that it failed."""
    with Disk(run, fatal, mode).mounted():
        try:
            act(run)
        except (ResourceError, Killed):
            return True
    return False


@pytest.mark.parametrize("name", SCENES)
def test_each_operation_leaves_the_old_or_the_new(name: str, tmp_path: Path):
    total = num_operations(name, tmp_path)
    print(f"{name}: {total} operations x {len(MODES)} ways to fail")
    assert total > 20 or SCENES[name].old == SCENES[name].new
    for mode, fatal in itertools.product(MODES, range(total)):
        run = tmp_path / f"{mode} {fatal}"
        scene = set_up(name, run)
        failed = disturbed(scene.act, run, fatal, mode)
        seen = scene.seen(run)
        assert seen in ((scene.old, scene.new) if failed else (scene.new,)), (mode, fatal)
        scene.after(run)
        assert scene.seen(run) == scene.last, (mode, fatal)
        assert not list(run.rglob(".*")), (mode, fatal)  # what a kill left is cleared away
        shutil.rmtree(run)


def crash_twice(name: str, run: Path, first: int, second: int) -> None:
    """Crash a save, crash the save of the run that goes on from there, and go on again."""
    scene = set_up(name, run)
    disturbed(scene.act, run, first, "killed")
    seen = scene.seen(run)
    failed = disturbed(scene.after, run, second, "killed")
    assert scene.seen(run) in ((seen, scene.last) if failed else (scene.last,))
    scene.after(run)
    assert scene.seen(run) == scene.last
    assert not list(run.rglob(".*"))
    shutil.rmtree(run)


def pairs(name: str, folder: Path) -> list[tuple[int, int]]:
    total = num_operations(name, folder)
    return list(itertools.product(range(total), range(total + 10)))  # the second save has to clear up, too


@pytest.mark.parametrize("name", CRASHING)
def test_crash_while_resuming_from_a_crash(name: str, tmp_path: Path):
    for first, second in random.Random(0).sample(pairs(name, tmp_path), 25):
        crash_twice(name, tmp_path / f"{first} {second}", first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", CRASHING)
def test_all_crashes_while_resuming_from_a_crash(name: str, tmp_path: Path):
    for first, second in pairs(name, tmp_path):
        crash_twice(name, tmp_path / f"{first} {second}", first, second)


def test_model_that_waits_for_its_place_survives_further_crashes(tmp_path: Path):
    for fatal in range(40):
        run = tmp_path / str(fatal)
        scene = set_up("model in an older one's place", run)
        (run / "model").rename(run / ".model.new")  # killed between the two renames
        disturbed(scene.act, run, fatal, "killed")
        assert scene.seen(run) in (scene.old, scene.new), fatal


def test_old_checkpoint_that_cannot_be_removed_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save(tmp_path, 1)
    with Disk(tmp_path).mounted() as disk:
        save(tmp_path, 2)
    fatal = disk.count  # of the same operations for the next save, and then it removes
    with Disk(tmp_path, fatal).mounted():
        save(tmp_path, 3)
    assert "an old checkpoint cannot be removed" in caplog.text
    assert step_of(tmp_path) == 3
    save(tmp_path, 4)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]
