"""Experiment trackers, in addition to the log: tensorboard, trackio and wandb, through accelerate."""

import contextlib
import importlib
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
from data_tools.core.secrets import hide_secrets

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb")
ID_FILE = "tracker_id"


def tracker_arguments(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the arguments of `Accelerator` for these trackers; nothing is started or written yet.

    Raises:
        UsageError: an unknown tracker, or one whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS) or f"choose from {', '.join(TRACKERS)}"
            raise UsageError(f"unknown tracker {name!r}", where="train.trackers", hint=hint)
        if importlib.util.find_spec(name) is None:
            what = f"the tracker {name!r} is not installed"
            raise UsageError(what, where="train.trackers", hint=f"pip install {name}, or remove it from train.trackers")
    if not names:
        return {}
    return {"log_with": list(names), "project_config": ProjectConfiguration(logging_dir=str(folder / "tensorboard"))}


def import_trackers(names: Sequence[str]) -> None:
    """Import the packages of trackers; raise UsageError for one that is installed and cannot be used."""
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except Exception as error:  # whatever a broken installation raises
            what = f"the tracker {name!r} cannot be imported: {error}"
            hint = "repair its installation, or remove the tracker from train.trackers"
            raise UsageError(what, where="train.trackers", hint=hint) from error


class Trackers:
    """The trackers of `accelerator`, used by the main rank; `folder` is that of the run.

    A resumed run stays one run in trackio and in an online wandb, by an id stored in the folder. Nothing is sent from
    this machine unless WANDB_MODE=online or the settings of trackio ask for it. A tracker that fails during the run is
    removed with a warning; the log is complete without it.

    Raises:
        UsageError: a tracker cannot be started.
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
        shown = {key: _without_secrets(value) for key, value in config.items()}
        settings = {"config": shown, "resume": "allow"}
        mode = os.environ.get("WANDB_MODE", "offline")
        arguments = {
            "trackio": {"name": f"{folder.name}-{run_id}", **settings},
            "wandb": {"name": folder.name, "id": run_id, "dir": str(folder), "mode": mode, **settings},
        }
        try:
            with contextlib.redirect_stdout(sys.stderr):
                accelerator.init_trackers("mmvit", init_kwargs=arguments)
        except Exception as error:
            hint = "fix the reported cause, or remove the tracker from train.trackers"
            raise UsageError(f"a tracker cannot be started: {error}", where="train.trackers", hint=hint) from error

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Send the numeric values of a step to the trackers; other values are only in the log."""
        values = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        """Flush and close each tracker."""
        with contextlib.redirect_stdout(sys.stderr):
            self._each(lambda tracker: tracker.finish())
        self.running.clear()

    def _each(self, call: Any) -> None:
        for tracker in list(self.running):
            try:
                call(tracker)
            except Exception as error:
                logger.warning("the tracker %s failed and is disabled for the rest of the run: %s", tracker.name, error)
                self.running.remove(tracker)


def _without_secrets(value: Any) -> Any:
    """Return a setting as others may see it: no URL of the data has a password or a token."""
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return hide_secrets(value) if isinstance(value, str) else value
