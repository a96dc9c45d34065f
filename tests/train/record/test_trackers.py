"""Trackers get each logged step once, also over a resume, and never cost a run."""

import importlib.util
import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from data_tools.core.errors import UsageError
from mmvit.train.record.run_log import RunLog, read_log
from mmvit.train.record.trackers import Trackers, tracker_arguments


@pytest.fixture
def log_steps() -> Callable[[str, Path, int, range], None]:
    """Log steps of a run with a tracker, as one start of the program does."""

    def run(name: str, folder: Path, start_step: int, steps: range) -> None:
        folder.mkdir(exist_ok=True)
        accelerator = Accelerator(cpu=True, **tracker_arguments([name], folder))
        trackers = Trackers(accelerator, folder, {"seed": 3, "optim.name": "muon"})
        log = RunLog(folder / "log.jsonl", num_steps=10, start_step=start_step, active=True, trackers=trackers)
        for step in steps:
            log.write(step, {"loss": 1 / step, "bad_causes": {"bad-image": 1}})
        log.close()

    return run


def scalars(folder: Path) -> Iterator[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                assert value.tag == "loss"
                yield event.step, value.tensor.float_val[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_each_step_once_over_a_resume(tmp_path: Path, log_steps: Callable[..., None]):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    log_steps("tensorboard", run, 0, range(1, 5))
    log_steps("tensorboard", run, 2, range(3, 8))  # steps 3 and 4 were lost in a crash, but logged
    found = list(scalars(run / "tensorboard"))
    assert [step for step, _ in found] == list(range(1, 8))
    assert [loss for _, loss in found] == pytest.approx([1 / step for step in range(1, 8)])
    assert [line["step"] for line in read_log(run / "log.jsonl")] == list(range(1, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackio_resumes_the_same_run(tmp_path: Path, log_steps: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio import utils  # reads the variable once, when it is first imported

    run = tmp_path / "run"
    log_steps("trackio", run, 0, range(1, 4))
    log_steps("trackio", run, 1, range(2, 6))
    (database,) = utils.TRACKIO_DIR.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step FROM metrics ORDER BY step").fetchall()
    connection.close()
    name = f"run-{(run / 'tracker_id').read_text()}"
    assert rows == [(name, step) for step in range(1, 6)]


def test_wandb_stays_on_this_machine(tmp_path: Path, log_steps: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    log_steps("wandb", run, 0, range(1, 4))
    run_id = (run / "tracker_id").read_text()
    assert list((run / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))


def test_missing_package_is_reported_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="'trackio' is not installed") as error:
        tracker_arguments(["trackio"], tmp_path)
    assert error.value.hint.startswith("pip install trackio")
    assert not list(tmp_path.iterdir())


def test_unknown_tracker_gets_a_hint(tmp_path: Path):
    with pytest.raises(UsageError) as error:
        tracker_arguments(["tensorbord"], tmp_path)
    assert error.value.hint == "did you mean 'tensorboard'?"


def test_no_tracker_needs_nothing(tmp_path: Path):
    assert tracker_arguments([], tmp_path) == {}
    trackers = Trackers(Accelerator(cpu=True), tmp_path, {})
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert not list(tmp_path.iterdir())


class Broken:
    name = "broken"

    def start(self) -> None:
        raise OSError("no connection")

    def log(self, values: dict[str, float], step: int) -> None:
        raise OSError("no connection")

    def finish(self) -> None:
        raise OSError("no connection")


def test_tracker_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    accelerator = Accelerator(cpu=True)
    trackers = Trackers(accelerator, tmp_path, {})
    trackers.running.append(Broken())
    log = RunLog(tmp_path / "log.jsonl", num_steps=2, start_step=0, active=True, trackers=trackers)
    with caplog.at_level(logging.WARNING):
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 0.5})
    log.close()
    assert caplog.text.count("the tracker broken failed") == 1
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [1.0, 0.5]


def test_tracker_that_cannot_start_is_a_matter_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    monkeypatch.setattr(TensorBoardTracker, "start", Broken.start)
    accelerator = Accelerator(cpu=True, **tracker_arguments(["tensorboard"], tmp_path))
    with pytest.raises(UsageError, match="a tracker cannot be started: no connection"):
        Trackers(accelerator, tmp_path, {})


def test_trackers_get_no_secrets_of_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They may belong to others."""
    given: dict[str, Any] = {}
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "log_with", ["wandb"])
    monkeypatch.setattr(accelerator, "init_trackers", lambda _, init_kwargs: given.update(init_kwargs["wandb"]))
    urls = ["https://user:SECRET@host/a.tar?token=SECRET", "b.tar"]
    Trackers(accelerator, tmp_path, {"data.train": urls, "train.init": urls[0], "seed": 3})
    shown = ["https://host/a.tar", "b.tar"]
    assert given["config"] == {"data.train": shown, "train.init": shown[0], "seed": 3}
