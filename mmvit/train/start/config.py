"""The config of a supervised run, with missing settings filled in from the model that it starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmvit.config import CONFIG, FinetuneConfig, find_config, from_tree, in_run_folder, read_tree
from mmvit.model_folder import CLASSIFIER, DUAL_ENCODER, find_model
from mmvit.train.start.own_data import for_own_data

EMBEDDING = ("embed_dim", "image_projection")


def load_finetune_config(
    source: str | Path, overrides: Sequence[str] = (), *, open_keys: Sequence[str] = ()
) -> FinetuneConfig:
    """Load the config of a supervised run; the model settings of `train.init` are the defaults.

    Without `model.image.kind` the keys of `model.image` override those of that model; with it they describe the whole
    tower. Missing keys of `preprocess`, the kind of head of a classifier, and the projection that its head or
    `templates` need come from that model too. If it no longer exists, they come from the config in the run folder.

    Raises:
        UsageError: as `load_config`; or neither the model nor the run folder exists.
        CheckpointError: `train.init` is not a model folder.
    """
    tree = in_run_folder(read_tree(source, overrides, FinetuneConfig), source, overrides)
    tree = for_own_data(tree, source, overrides)
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
    return from_tree(FinetuneConfig, tree, str(find_config(source)), overrides, open_keys=open_keys)


def _settings(init: str, out: Path) -> dict[str, Any]:
    if not Path(init).exists() and (out / CONFIG).is_file():
        return {"kind": CLASSIFIER} | read_tree(out / CONFIG)
    folder = find_model(init)  # before torch is imported
    from mmvit.checkpoint import image_settings

    return image_settings(folder)


def _at(tree: Any, key: str) -> dict[str, Any]:
    """Return the mapping at a key, inserted if missing; a detached empty one if the tree is no mapping."""
    found = tree.setdefault(key, {}) if isinstance(tree, dict) else {}
    return found if isinstance(found, dict) else {}
