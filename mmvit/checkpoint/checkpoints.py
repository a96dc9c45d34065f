"""Crash-safe training checkpoints."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_tools.core.errors import CheckpointError
from data_tools.core.files import fsync_tree, remove_folder, remove_leftovers
from data_tools.core.output_folder import atomic_folder
from mmvit.checkpoint.sealed import (
    FORMAT_VERSION,
    OtherVersionError,
    digests_of,
    disk_for,
    read_sealed,
    unreadable,
    verify_files,
    write_sealed,
    write_tensors,
)

MANIFEST = "manifest.json"
STATE = "state.json"

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A loaded checkpoint: `tensors` by file stem ("model", "optimizer", "ema"), `state` as it was saved."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int,
    keep_every: int | None = None,
) -> Path:
    """Write `run/checkpoints/step-NNNNNNNN`, then remove checkpoints that are no longer kept.

    The newest `keep_last` are kept, and all whose step is a multiple of `keep_every`. The folder is built under a
    temporary name, synced and renamed; its manifest is written last. A crash leaves either no folder or an intact one.
    Checkpoints of later steps, which could not be read and are repeated, and leftovers of killed saves are removed too.
    An intact checkpoint of this step is not rewritten.

    Raises:
        ResourceError: the disk is full or fails; earlier checkpoints are unchanged.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    remove_leftovers(final.parent, "step-*")
    if not (final.exists() and _is_intact(final)):
        with disk_for(tensors.values(), final):
            if final.exists():
                remove_folder(final)
            with atomic_folder(final) as folder:
                for name, group in tensors.items():
                    write_tensors(group, folder / f"{name}.safetensors")
                (folder / STATE).write_text(json.dumps(dict(state), indent=1))
                fsync_tree(folder)
                facts = {"format_version": FORMAT_VERSION, "step": step, "files": digests_of(folder)}
                write_sealed(folder / MANIFEST, facts)
    _prune(run, step, keep_last, keep_every)
    return final


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if there are none; damaged ones are skipped with a warning.

    Raises:
        OtherVersionError: the newest has another format version; to continue without it would destroy it.
        ResourceError: the disk cannot read one, which may be intact.
        CheckpointError: there are checkpoints, but all are damaged.
    """
    damaged: list[tuple[int, CheckpointError]] = []
    found = None
    for step, folder in reversed(_checkpoint_folders(run).items()):
        try:
            found = read_checkpoint(folder)
            break
        except OtherVersionError:
            raise
        except CheckpointError as error:
            damaged.append((step, error))
    if damaged and found is None:
        reasons = "; ".join(error.what for _, error in damaged)
        raise CheckpointError(
            f"all checkpoints of this run are damaged: {reasons}",
            where=str(run / "checkpoints"),
            note="nothing was changed",
            hint="move this folder away to restart the run from step 0",
        )
    start = found.step if found else 0
    for step, why in damaged:
        resumed = f"resuming at step {start}, {step - start} steps are repeated"
        logger.warning("%s; %s\n  where: %s", why.what, resumed, why.where)
    return found


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint; raises CheckpointError if a file is missing, truncated or changed."""
    manifest = verify_folder(folder)
    names = [name for name in manifest["files"] if name.endswith(".safetensors")]
    try:
        tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in names}
        state = json.loads((folder / STATE).read_text())
    except OSError as error:
        raise unreadable(folder, error) from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder.name} cannot be read: {error}", where=str(folder)) from error
    return Checkpoint(folder, manifest["step"], tensors, state)


def check_leaves(checkpoint: Checkpoint, groups: Collection[str], state: Collection[str]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly these groups of tensors, and no other `state` entries.

    State that a run does not restore would be lost silently; `state` entries that older versions did not write may be
    missing.
    """
    unknown = sorted({*checkpoint.tensors} - {*groups} | {*checkpoint.state} - {*state})
    missing = sorted({*groups} - {*checkpoint.tensors})
    if unknown or missing:
        what = f"has {', '.join(unknown)}, which this run does not" if unknown else f"lacks {', '.join(missing)}"
        raise CheckpointError(
            f"{checkpoint.folder.name} {what}",
            where=str(checkpoint.folder),
            note="resuming would lose a part of the state; nothing was changed",
            hint="use the version of mmvit and the config that wrote it, or start a new run with another out=FOLDER",
        )


def verify_folder(folder: Path) -> dict[str, Any]:
    """Verify every file against the folder's manifest and return the manifest; raises CheckpointError with the file."""
    manifest = read_sealed(folder / MANIFEST, {"format_version": int, "step": int, "files": dict})
    verify_files(folder, manifest["files"], STATE)
    return manifest


def _is_intact(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except OtherVersionError:
        raise
    except CheckpointError:
        return False
    return True


def _checkpoint_folders(run: Path) -> dict[int, Path]:
    """Return the folders by step, oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")}
    return dict(sorted((int(step), path) for path, step in steps.items() if step.isdecimal()))


def _prune(run: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    folders = _checkpoint_folders(run)
    kept = {each for each in folders if each <= step and keep_every and each % keep_every == 0}
    kept.update([each for each in folders if each <= step][-max(keep_last, 1) :])
    for each in folders.keys() - kept:
        try:
            remove_folder(folders[each])
        except OSError as error:  # the next save tries again
            logger.warning("an old checkpoint cannot be removed: %s", error)
