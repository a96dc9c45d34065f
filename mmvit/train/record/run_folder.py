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

CONFIG = "config.yaml"

# What a setting means to a run that goes on. A name that ends with a dot stands for all below it.
# Free: it changes no weight, or only the rounding. What lies at a path may move; its content is compared.
FREE = (
    *("out", "data.train", "data.image_embeddings", "tokenizer.path", "loss.teacher", "zero_shot."),
    *("classes", "validation."),
    *("data.num_workers", "data.prefetch_mb", "data.stall_timeout_s", "data.max_bad_fraction"),
    *("loss.layout", "train.checkpointing", "train.compile", "train.timeout_s"),
    *("train.log_every", "train.trackers", "train.save_every", "train.keep_last", "train.keep_every"),
)
# Told: the run keeps its identity, but from here on takes another course than its old settings would have given.
TOLD = (
    "train.steps",  # trained longer or shorter: the schedule and the stages stretch
    "train.micro_batches",  # another memory: the same mathematics, sums in another order
    *("train.init", "train.init_only"),  # the run is past its start
    "train.spike_factor",  # the guards against a bad step are what is changed after one
    "optim.clip_norm",
    "data.verify",  # whether damaged bytes are noticed
)
# Refused: with another value it is another experiment, whose figures nobody could explain from one config, or its
# saved state does not fit.
REFUSED = (
    *("seed", "model.", "preprocess.", "tokenizer.kind", "tokenizer.start", "tokenizer.end", "tokenizer.pad"),
    *("data.weights", "data.captions", "data.augment.", "data.decode", "data.patch_budget"),
    "data.repeats",
    "data.cache_mb",  # with a cache all pictures are decoded exactly
    "curriculum",
    *("templates", "wise_ft", "mix."),
    *("loss.label_smoothing", "loss.weight", "loss.temperature", "loss.reduction"),
    *("loss.kind", "loss.learn_logit_scale", "loss.max_logit_scale"),
    *("loss.joint_captions", "loss.captioning", "loss.token_classification", "loss.distillation"),
    *("optim.name", "optim.lr", "optim.betas", "optim.eps", "optim.weight_decay", "optim.layer_decay"),
    *("optim.muon_lr", "optim.muon_momentum", "optim.muon_weight_decay"),
    *("optim.warmup_share", "optim.decay", "optim.decay_share", "optim.ema_decay"),
    "lora.",
    *("train.batch_size", "train.precision", "train.same_caption_positives", "train.freeze"),
)

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
            return _differences(folder, load_config(type(config), path), config, num_steps)
    else:
        check_free(folder, "the output folder is not empty and holds no run", hint="name another out=FOLDER")
    return ""


def is_among(key: str, names: Sequence[str]) -> bool:
    """Tell whether the setting is one of the names, or below one of them."""
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)


def settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted key; a list is one setting."""
    return _flat(asdict(config))


def _differences(folder: Path, saved: RunConfig, now: RunConfig, num_steps: int) -> str:
    old, new = settings(saved), settings(now)  # a key that is younger than the folder has its default there
    changed = [key for key in new if old[key] != new[key] and not is_among(key, FREE)]
    refused = [key for key in changed if not is_among(key, TOLD)]
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
    return "\n".join(f"    {key}: {old[key]} -> {new[key]}" for key in keys)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()
    }
