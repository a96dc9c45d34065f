"""Configs of runs, with missing settings filled in from the model that a run starts from and from its tokenizer."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data_tools.core.errors import UsageError
from mmvit.config import (
    CONFIG,
    FinetuneConfig,
    LossConfig,
    PretrainConfig,
    find_config,
    from_tree,
    in_run_folder,
    read_tree,
)
from mmvit.data.config import TokenizerConfig
from mmvit.model_folder import CLASSIFIER, DUAL_ENCODER, find_model
from mmvit.train.start.own_data import for_own_data, with_own_captions

EMBEDDING = ("embed_dim", "image_projection")
OPEN = "???"  # a value that a recipe leaves to the user
OF_THE_TOKENIZER = ("vocab_size", "end_of_text")  # keys of the text tower


def load_pretrain_config(
    source: str | Path, overrides: Sequence[str] = (), *, open_keys: Sequence[str] = ()
) -> PretrainConfig:
    """Load the config of an image-text run; the settings of `train.init` are the defaults.

    Keys of `model`, `preprocess` and `tokenizer` that the config does not set come from the model to start from; with
    `train.init_only`, only those of the towers that it takes. Vocabulary size and end-of-text token of a new text tower
    come from the tokenizer, unless they are set. If the model no longer exists, all come from the config in the run
    folder.

    Raises:
        UsageError: as `load_config`; or neither the model nor the run folder exists.
        CheckpointError: `train.init` is not a model folder.
    """
    tree = in_run_folder(read_tree(source, overrides, PretrainConfig), source, overrides)
    tree = with_own_captions(tree, source, overrides)
    train = _at(tree, "train")
    init, patterns = train.get("init"), train.get("init_only") or []
    if isinstance(init, str) and init:
        found = _settings(init, Path(str(tree.get("out", PretrainConfig.out))), DUAL_ENCODER)
        _fill_dual_encoder(tree, found, [patterns] if isinstance(patterns, str) else patterns)
    _choose_file_kind(tree, overrides)
    where = str(find_config(source))
    config = from_tree(PretrainConfig, tree, where, overrides, open_keys=open_keys)  # before torch is imported
    if _fill_from_tokenizer(tree, overrides):
        config = from_tree(PretrainConfig, tree, where, overrides, open_keys=open_keys)
    return config


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
        found = _settings(init, Path(str(tree.get("out", FinetuneConfig.out))), CLASSIFIER)
        before, model = found["model"], _at(tree, "model")
        _fill_image(tree, found)
        if found["kind"] == CLASSIFIER or (found["kind"] == DUAL_ENCODER and tree.get("templates")):
            model.update({key: before[key] for key in ("head", *EMBEDDING) if key in before} | model)
    return from_tree(FinetuneConfig, tree, str(find_config(source)), overrides, open_keys=open_keys)


def compares_pairs(source: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Return whether a config has a contrastive loss, which compares images and captions."""
    return _at(read_tree(source, overrides), "loss").get("kind") in get_args(get_type_hints(LossConfig)["kind"])


def _fill_image(tree: Any, found: dict[str, Any]) -> None:
    """Set missing keys of the image tower, unless the config chooses its kind, and of the preprocessing."""
    image, preprocess = _at(_at(tree, "model"), "image"), _at(tree, "preprocess")
    if "kind" not in image:
        image.update(found["model"]["image"] | image)
    preprocess.update(found["preprocess"] | preprocess)


def _fill_dual_encoder(tree: Any, found: dict[str, Any], patterns: Sequence[str]) -> None:
    before, model = found["model"], _at(tree, "model")

    def taken(probe: str) -> bool:
        return not patterns or any(fnmatchcase(probe, pattern) for pattern in patterns)

    if taken("image_tower.norm.weight"):
        _fill_image(tree, found)
    if found["kind"] == DUAL_ENCODER and taken("text_tower.norm.weight"):
        text, tokenizer = _at(model, "text"), _at(tree, "tokenizer")
        text.update(before["text"] | text)
        tokenizer.update(found["tokenizer"] | tokenizer)
        model.update(before | model)


def _choose_file_kind(tree: Any, overrides: Sequence[str]) -> None:
    """Set the kind of the tokenizer, "file", where only its path is given."""
    tokenizer, given = _at(tree, "tokenizer"), {override.partition("=")[0] for override in overrides}
    if tokenizer.get("path") and "tokenizer.kind" not in given:
        tokenizer["kind"] = "file" if "tokenizer.path" in given else tokenizer.get("kind", "file")


def _fill_from_tokenizer(tree: Any, overrides: Sequence[str]) -> bool:
    """Set the keys of the text tower that follow from the tokenizer of a file, where they are not set.

    A tokenizer that is chosen on the command line determines them too: those of the file belong to another one.
    Returns whether a key was set.
    """
    tokenizer, text = _at(tree, "tokenizer"), _at(_at(tree, "model"), "text")
    given = {override.partition("=")[0] for override in overrides}
    chosen = "tokenizer.path" in given
    missing = [key for key in OF_THE_TOKENIZER if key not in text or (chosen and f"model.text.{key}" not in given)]
    if not missing or not tokenizer.get("path") or tokenizer["kind"] != "file":
        return False
    from mmvit.data.tokenizers import build_tokenizer, tokenizer_file  # with torch

    if not tokenizer_file(tokenizer["path"]).is_file():
        return False  # reported when the run opens it
    opened = build_tokenizer(from_tree(TokenizerConfig, tokenizer, "tokenizer"), 77)
    text.update({key: getattr(opened, key) for key in missing})
    return True


def _settings(init: str, out: Path, kind: str) -> dict[str, Any]:
    if init == OPEN:
        hint = "train.init=MODEL: a run or model folder, open_clip:ARCH/TAG or hf:NAME"
        raise UsageError("the recipe starts from a model, and none is given", where="train.init", hint=hint)
    if not Path(init).exists() and (out / CONFIG).is_file():
        return {"kind": kind, "tokenizer": {}} | read_tree(out / CONFIG)
    folder = find_model(init)  # before torch is imported
    from mmvit.checkpoint import model_settings

    return model_settings(folder)


def _at(tree: Any, key: str) -> dict[str, Any]:
    """Return the mapping at a key, inserted if missing; a detached empty one if the tree is no mapping."""
    found = tree.setdefault(key, {}) if isinstance(tree, dict) else {}
    return found if isinstance(found, dict) else {}
