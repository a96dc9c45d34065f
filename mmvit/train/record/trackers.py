"""Trackers that show a run beside its log: tensorboard, trackio and wandb, by name, through accelerate."""

import contextlib
import importlib.util
import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from data_tools.core.errors import UsageError, did_you_mean
from data_tools.core.files import write_atomic

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb")
ID_FILE = "tracker_id"


def tracker_arguments(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return what `Accelerator` takes to keep these trackers; nothing is started or written yet.

    Raises:
        UsageError: a tracker that there is not, or whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS) or f"choose from {', '.join(TRACKERS)}"
            raise UsageError(f"there is no tracker {name!r}", where="train.trackers", hint=hint)
        if importlib.util.find_spec(name) is None:
            what = f"the tracker {name!r} is not installed"
            raise UsageError(what, where="train.trackers", hint=f"pip install {name}, or leave it out")
    if not names:
        return {}
    return {"log_with": list(names), "project_config": ProjectConfiguration(logging_dir=str(folder / "tensorboard"))}


class Trackers:
    """The trackers that `accelerator` was made for, for its main process; `folder` is that of the run.

    A run that goes on is one run to trackio and to an online wandb too, by an id kept in the folder. Nothing leaves
    this machine unless WANDB_MODE=online, or trackio's own settings, say so. A tracker that fails while the run goes
    is dropped with a warning: the log is the record.

    Raises:
        UsageError: a tracker that cannot start.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, config: Mapping[str, Any]):
        self.running = accelerator.trackers
        if not accelerator.log_with:
            return
        path = folder / ID_FILE
        if not path.exists():
            write_atomic(path, secrets.token_hex(4).encode())
        run_id = path.read_text()
        if "trackio" in accelerator.log_with:
            os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
        settings = {"config": dict(config), "resume": "allow"}
        mode = os.environ.get("WANDB_MODE", "offline")
        arguments = {
            "trackio": {"name": f"{folder.name}-{run_id}", **settings},
            "wandb": {"name": folder.name, "id": run_id, "dir": str(folder), "mode": mode, **settings},
        }
        try:
            with contextlib.redirect_stdout(sys.stderr):
                accelerator.init_trackers("mmvit", init_kwargs=arguments)
        except Exception as error:
            hint = "fix what it says, or leave the tracker out"
            raise UsageError(f"a tracker cannot start: {error}", where="train.trackers", hint=hint) from error

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Hand on the numbers of a step; what is no number stays in the log alone."""
        values = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        """Have each tracker write what it holds back."""
        with contextlib.redirect_stdout(sys.stderr):
            self._each(lambda tracker: tracker.finish())
        self.running.clear()

    def _each(self, call: Any) -> None:
        for tracker in list(self.running):
            try:
                call(tracker)
            except Exception as error:
                logger.warning("the tracker %s failed and is left out from here on: %s", tracker.name, error)
                self.running.remove(tracker)
