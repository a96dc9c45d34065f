"""The folder of a run: made new, or taken up again by the same run."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.core.errors import UsageError
from data_tools.core.files import make_folder, remove_leftovers, write_atomic
from data_tools.core.output_folder import check_free
from mmvit.config import RunConfig, load_config, to_yaml
from mmvit.keys import declared

CONFIG = "config.yaml"

logger = logging.getLogger(__name__)


def open_run_folder(folder: Path, config: RunConfig) -> None:
    """Make the folder of a new run, or take up that of this very run, and write `config.yaml`.

    Raises:
        UsageError: the folder holds another run, or something that is no run.
    """
    told = check_run_folder(folder, config)
    if told:
        logger.warning("the run goes on with other settings:\n%s", told)
    make_folder(folder)
    remove_leftovers(folder, "*")
    write_atomic(folder / CONFIG, to_yaml(config).encode())


def check_run_folder(folder: Path, config: RunConfig) -> str:
    """Return the settings that the run goes on with otherwise than before, a line each; nothing is written.

    A run that has neither a checkpoint nor a model yet has nothing to mix up: its settings may change.

    Raises:
        UsageError: the folder holds another run, or something that is no run.
    """
    path = folder / CONFIG
    if path.is_file():
        steps = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
        if (folder / "model").exists() and not steps:
            raise UsageError(
                "the run has written its model, and its checkpoints are gone",
                where=str(folder),
                note="nothing was changed: it could only begin anew and replace that model",
                hint="name another out=FOLDER",
            )
        if steps:
            num_steps = max((int(step) for step in steps if step.isdecimal()), default=0)
            return _differences(folder, load_config(type(config), path, complete=False), config, num_steps)
    else:
        check_free(folder, "the output folder is not empty and holds no run", hint="name another out=FOLDER")
    return ""


def settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted key; a list is one setting."""
    return _flat(asdict(config))


def _differences(folder: Path, saved: RunConfig, now: RunConfig, num_steps: int) -> str:
    old, new = settings(saved), settings(now)  # a key that is younger than the folder has its default there
    keys = declared(saved) | declared(now)  # an image tower of another kind has other keys
    changed = [key for key in keys if old.get(key) != new.get(key) and keys[key].resume != "free"]
    refused = [key for key in changed if keys[key].resume == "same"]
    if refused:
        raise UsageError(
            f"the folder holds another run; these settings differ:\n{_table(refused, old, new)}",
            where=str(folder),
            note="going on would mix two runs; nothing was changed",
            hint="take the old settings, or start anew with another out=FOLDER",
        )
    if now.train.steps < num_steps:
        raise UsageError(
            f"the run is at step {num_steps}, beyond the {now.train.steps} that it is to have now",
            where="train.steps",
            note="nothing was changed",
            hint=f"train.steps={num_steps}, or more",
        )
    return _table(changed, old, new)


def _table(keys: Sequence[str], old: dict[str, Any], new: dict[str, Any]) -> str:
    return "\n".join(f"    {key}: {old.get(key)} -> {new.get(key)}" for key in keys)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()
    }
