"""The config of a supervised run, with what it leaves out taken from the model that it starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.core.errors import UsageError
from mmvit.checkpoint import CLASSIFIER, DUAL_ENCODER, image_settings
from mmvit.config import FinetuneConfig, config_place, from_tree, read_tree
from mmvit.train.record.run_folder import CONFIG

EMBEDDING = ("embed_dim", "image_projection")


def load_finetune_config(source: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read the config of a supervised run; a run that goes on from `train.init` need not describe its model.

    Of `model.image` it says what shall be otherwise, such as `image_size`; with a `kind` it describes all of it.
    `preprocess`, the kind of head of a classifier, and the projection that its head or `templates` need are those of
    the model too. Where that is gone, the run's own folder says what they were.

    Raises:
        UsageError: as `load_config`; or there is neither the model nor the run.
        CheckpointError: `train.init` is there and no model folder.
    """
    tree = read_tree(source, overrides, FinetuneConfig)
    init = _at(tree, "train").get("init")
    if isinstance(init, str) and init:
        found = _settings(init, Path(str(tree.get("out", FinetuneConfig.out))))
        before, model, preprocess = found["model"], _at(tree, "model"), _at(tree, "preprocess")
        image = _at(model, "image")
        if "kind" not in image:
            image.update(before["image"] | image)
        if found["kind"] == CLASSIFIER or (found["kind"] == DUAL_ENCODER and tree.get("templates")):
            model.update({key: before[key] for key in ("head", *EMBEDDING) if key in before} | model)
        preprocess.update(found["preprocess"] | preprocess)
    return from_tree(FinetuneConfig, tree, where=config_place(source, overrides))


def _settings(init: str, out: Path) -> dict[str, Any]:
    if Path(init).exists():
        return image_settings(init)
    if (out / CONFIG).is_file():
        return {"kind": CLASSIFIER} | read_tree(out / CONFIG)
    raise UsageError("there is no such model", where=f"train.init={init}", hint="give the model/ folder of a run")


def _at(tree: Any, key: str) -> dict[str, Any]:
    """Return the mapping at a key, made where it is missing; an empty one beside the tree where none can be."""
    found = tree.setdefault(key, {}) if isinstance(tree, dict) else {}
    return found if isinstance(found, dict) else {}
