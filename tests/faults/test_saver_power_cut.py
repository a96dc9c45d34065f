"""The power goes in a save: what was not synced may be lost, in part and in any order, and nothing that counts is.

ALICE in miniature (Pillai et al., OSDI 2014).
"""

import random
import shutil
from pathlib import Path

import pytest
from disk import Disk, Platter
from saves import CRASHING, SCENES, set_up

pytestmark = pytest.mark.usefixtures("quick_saves")


def cut_power(name: str, folder: Path, seeds: range, forget_syncs: bool = False) -> list[int]:
    """Save once, and see what a power cut may leave after each number of operations; returns the seeds that lose."""
    scene = SCENES[name]
    run = folder / "recorded"
    set_up(name, run)
    before = Path(shutil.copytree(run, folder / "start"))
    with Disk(run).mounted() as disk:
        scene.act(run)
    events = [event for event in disk.events if not (forget_syncs and event[0] == "sync")]
    losing = []
    for seed in seeds:
        rng = random.Random(seed)
        num_events = len(events) if seed % 4 == 0 else rng.randrange(len(events))
        left = folder / f"left-{seed}"
        platter = Platter(before)
        platter.root = run  # where the events say that they happened
        platter.replay(events[:num_events], rng, left)
        try:
            # What the program was told to be saved is saved; before that, either state will do.
            assert scene.seen(left) in ((scene.new,) if num_events == len(events) else (scene.old, scene.new))
            scene.after(left)
            assert scene.seen(left) == scene.last
            assert not list(left.rglob(".*"))
        except Exception as error:
            print(f"{name}, seed {seed}, {num_events} of {len(events)} operations: {error!r}")
            losing.append(seed)
        shutil.rmtree(left)
    return losing


@pytest.mark.parametrize("name", CRASHING)
def test_power_cut_loses_nothing(name: str, tmp_path: Path):
    assert cut_power(name, tmp_path, range(20)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CRASHING)
def test_two_thousand_power_cuts_lose_nothing(name: str, tmp_path: Path):
    assert cut_power(name, tmp_path, range(1000, 1400)) == []


def test_without_syncs_a_power_cut_would_lose_much(tmp_path: Path):
    assert len(cut_power("next save, the oldest goes", tmp_path, range(40), forget_syncs=True)) > 10
