"""The folder of a run: created by a new run, or reused when the run resumes."""

import contextlib
import copy
import functools
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.core.errors import UsageError
from data_tools.core.files import make_folder, remove_leftovers, write_atomic
from data_tools.core.output_folder import check_free
from data_tools.core.ownership import OWNER, owned
from mmvit.config import CONFIG, START, RunConfig, load_config, to_yaml
from mmvit.keys import declared
from mmvit.train.record.changes import Changes, describe_changes, table
from mmvit.train.record.log_lines import LOG as LOG
from mmvit.train.record.run_log import log_changes

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # of a URL, or of a command

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def own_run_folder(folder: Path, config: RunConfig) -> Iterator[None]:
    """Own the folder of a run within the block; raises UsageError if another process or another run has it."""
    marked = (folder / OWNER).exists()
    if not marked:
        check_run_folder(folder, config)  # first: what is no run folder is not touched
    with owned(folder):
        if marked:  # a living owner is named before the settings that differ from its own
            check_run_folder(folder, config)
        yield


def open_run_folder(folder: Path, config: RunConfig, step: int = 0) -> None:
    """Check that the folder belongs to this run and write `config.yaml`; changed settings are logged with the step.

    Raises:
        UsageError: the folder contains another run or other files.
    """
    changes = check_run_folder(folder, config)
    if changes:
        logger.warning("the run resumes with changed settings:\n%s", describe_changes(changes, config, step))
    make_folder(folder)
    remove_leftovers(folder, "*")
    if changes:
        log_changes(folder / LOG, step, changes)
    write_atomic(folder / CONFIG, to_yaml(anchored(config)).encode())


def check_run_folder(folder: Path, config: RunConfig) -> Changes:
    """Return the changed settings with which the run resumes; nothing is written.

    All settings may change while the run has neither a checkpoint nor a model.

    Raises:
        UsageError: the folder contains another run or other files.
    """
    path = folder / CONFIG
    if path.is_file():
        steps = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
        if (folder / "model").exists() and not steps:
            raise UsageError(
                "the run has written its model, but its checkpoints are missing",
                where=str(folder),
                note="nothing was changed: the run would restart and overwrite that model",
                hint="choose another out=FOLDER",
            )
        if steps:
            num_steps = max((int(step) for step in steps if step.isdecimal()), default=0)
            return _differences(folder, load_config(type(config), path, complete=False), config, num_steps)
    elif not _holds_start_alone(folder):
        check_free(folder, "the output folder is not empty and not a run folder", hint="choose another out=FOLDER")
    return {}


def _holds_start_alone(folder: Path) -> bool:
    """Return whether the folder holds nothing but the model that the run starts from."""
    return folder.is_dir() and [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [START]


def anchored(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths, except `out`: it means the same in any working directory.

    Names that are no files, such as those of prompt templates and of other libraries' models, stay what they are.
    """
    config = copy.deepcopy(config)
    for name, found in declared(config).items():
        *outer, last = name.split(".")
        part = functools.reduce(getattr, outer, config)
        value = getattr(part, last)
        if found.path and isinstance(value, list):
            setattr(part, last, [_absolute(each) for each in value])
        elif found.path and name != "out" and value and Path(value).exists():
            setattr(part, last, _absolute(value))
    return config


def _absolute(path: str) -> str:
    return path if _SCHEME.match(path) else str(Path.cwd() / path)


def settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings by dotted key; a list is one setting."""
    return _flat(asdict(config))


def _differences(folder: Path, saved: RunConfig, now: RunConfig, num_steps: int) -> Changes:
    # Keys that the saved config lacks have their defaults.
    old, new = settings(anchored(saved)), settings(anchored(now))
    keys = declared(saved) | declared(now)  # image towers of other kinds have other keys
    changed = {
        key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key) and keys[key].resume != "free"
    }
    refused = {key: values for key, values in changed.items() if keys[key].resume == "same"}
    if refused:
        raise UsageError(
            "\n".join(["the folder contains another run; these settings differ:", *table(refused)]),
            where=str(folder),
            note="resuming would mix two runs; nothing was changed",
            hint="use the old settings, or start a new run with another out=FOLDER",
        )
    if now.train.steps < num_steps:
        raise UsageError(
            f"the run is at step {num_steps}, beyond train.steps={now.train.steps}",
            where="train.steps",
            note="nothing was changed",
            hint=f"use train.steps={num_steps} or more",
        )
    return changed


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()
    }
