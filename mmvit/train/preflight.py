"""What a run needs at its end, checked before its first step; `--dry-run` applies the same checks."""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from data_tools.core.errors import MmvitError, UsageError
from mmvit.config import TrainConfig
from mmvit.train.record.trackers import import_trackers
from mmvit.train.run import Run

TIGHT = 0.9  # of the free disk space: more is warned about
# State tensors of an optimizer for each parameter, where it is not two.
STATES = {"SGD": 1, "Muon": 1}

logger = logging.getLogger(__name__)


def check_folder(run: Run) -> None:
    """Raise UsageError if the run folder, its checkpoints or its model cannot be written."""
    for folder in (run.folder, run.folder / "checkpoints", run.folder / "model"):
        there = nearest(folder)
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "is not a folder" if not there.is_dir() else "cannot be written"
            raise UsageError(f"{there} {what}", where=f"out={run.folder}", hint="choose another out=FOLDER")


def check_disk(run: Run) -> None:
    """Raise UsageError if the disk has no room for the checkpoints that are kept and for the model; warn if little."""
    one, model = checkpoint_bytes(run)
    num = num_checkpoints(run.config.train)
    folder = nearest(run.folder)
    written = sum(path.stat().st_size for path in run.folder.glob("*/**/*.safetensors"))  # before a resume
    needed, free = num * one + model, shutil.disk_usage(folder).free + written
    text = (
        f"the run writes {readable(needed)} and the disk has {readable(free)} free: up to {num} checkpoints of "
        f"{readable(one)} at once, and a model of {readable(model)}"
    )
    hint = "decrease train.keep_last, increase train.keep_every or train.save_every, or free disk space"
    if needed > free:
        raise UsageError(text, where=f"out={run.folder}", note="it would fail after hours", hint=hint)
    if needed > TIGHT * free:
        logger.warning("%s\n  hint: %s", text, hint)


def check_trackers(run: Run) -> None:
    """Raise UsageError if the package of a tracker cannot be imported."""
    import_trackers(run.config.train.trackers)


def check_evaluation(run: Run) -> None:
    """Raise UsageError or DataError if the held-out data cannot be evaluated: labels of all samples, and images."""
    for evaluator in run.task.evaluators:
        evaluator.check()


def check_training(run: Run) -> None:
    """Raise DataError if the training samples cannot be used, such as for a caption that none of them has."""
    run.task.batches.check_samples()


CHECKS: tuple[Callable[[Run], None], ...] = (
    check_folder,
    check_disk,
    check_trackers,
    check_training,
    check_evaluation,
)


def preflight(run: Run) -> None:
    """Apply all checks and raise one error for all that fail; only the main rank calls this."""
    errors = list(_errors(run))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UsageError("\n".join([f"the run would fail for {len(errors)} reasons", *(f"  - {e}" for e in errors)]))


def checkpoint_bytes(run: Run) -> tuple[int, int]:
    """Return the size of a checkpoint and that of the exported model."""
    model = sum(tensor.numel() * tensor.element_size() for tensor in run.model.state_dict().values())
    states = sum(
        4 * parameter.numel() * STATES.get(type(optimizer).__name__, 2)
        for optimizer in run.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    ema = sum(4 * tensor.numel() for tensor in run.ema.tensors().values()) if run.ema else 0
    return model + states + ema, model


def num_checkpoints(train: TrainConfig) -> int:
    """Return the largest number of checkpoints on the disk, with the one that is written before another is removed."""
    saved = math.ceil(train.steps / train.save_every)
    newest = min(saved, train.keep_last + 1)
    if train.keep_every is None:
        return newest
    before = max(0, train.steps - train.keep_last * train.save_every)  # steps whose checkpoints leave the newest ones
    return newest + before // math.lcm(train.save_every, train.keep_every)


def nearest(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each))


def _errors(run: Run) -> Iterator[MmvitError]:
    for check in CHECKS:
        try:
            check(run)
        except MmvitError as error:
            yield error


def readable(size: int) -> str:
    """Return a size in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
