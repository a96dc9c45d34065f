"""Crash-safe, self-contained model folders."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from data_tools.core.errors import CheckpointError
from data_tools.core.files import fsync_tree, remove_folder, remove_leftovers, rename_synced
from data_tools.core.output_folder import atomic_folder, check_free
from mmvit.checkpoint.sealed import (
    FORMAT_VERSION,
    WEIGHTS,
    digests_of,
    disk_for,
    load_weights,
    read_sealed,
    verify_files,
    write_sealed,
    write_tensors,
)
from mmvit.config import from_tree
from mmvit.data.tokenizers import TOKENIZER_FILE, Tokenizer, TokenizerConfig, build_tokenizer, resolve_tokenizer
from mmvit.data.transforms import PreprocessConfig
from mmvit.model_folder import CLASSIFIER, DESCRIPTION, DUAL_ENCODER, TOWER, check_kind, find_model, successor
from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.models.classifier import ClassifierConfig, ImageClassifier
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.models.image_towers import build_image_tower
from mmvit.towers.contract import Tower, TowerConfig

_KEYS = {"format_version": int, "kind": str, "model": dict, "preprocess": dict, "files": dict}
_KINDS = {DUAL_ENCODER: _KEYS | {"tokenizer": dict}, CLASSIFIER: _KEYS | {"class_names": list}, TOWER: _KEYS}


class LoadedClassifier(NamedTuple):
    """The loaded model folder of a classifier; `fingerprint` is the SHA-256 of the weights file."""

    model: ImageClassifier
    preprocess: PreprocessConfig
    config: ClassifierConfig
    fingerprint: str


class LoadedTower(NamedTuple):
    """The loaded image tower of a model folder."""

    tower: Tower
    preprocess: PreprocessConfig
    config: TowerConfig


class LoadedModel(NamedTuple):
    """The loaded model folder of a dual encoder; `fingerprint` is the SHA-256 of the weights file."""

    model: DualEncoder
    tokenizer: Tokenizer
    preprocess: PreprocessConfig
    config: DualEncoderConfig
    fingerprint: str


def save_model(
    folder: Path,
    model: DualEncoder,
    config: DualEncoderConfig,
    preprocess: PreprocessConfig,
    tokenizer: TokenizerConfig,
) -> None:
    """Write a self-contained model folder for `load_model`; an existing model folder is replaced."""
    files = {}
    if tokenizer.kind == "file":
        tokenizer = resolve_tokenizer(tokenizer)
        files[TOKENIZER_FILE] = Path(tokenizer.path).read_bytes()
    description = {
        "kind": DUAL_ENCODER,
        "model": asdict(config),
        "preprocess": asdict(preprocess),
        "tokenizer": asdict(replace(tokenizer, path=TOKENIZER_FILE if files else "")),
    }
    _save_folder(folder, model, description, files)


def save_classifier(
    folder: Path, model: ImageClassifier, config: ClassifierConfig, preprocess: PreprocessConfig
) -> None:
    """Write a self-contained model folder for `load_classifier`; an existing model folder is replaced."""
    description = {
        "kind": CLASSIFIER,
        "model": asdict(config),
        "class_names": model.class_names,
        "preprocess": asdict(preprocess),
    }
    _save_folder(folder, model, description, {})


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Load the model folder of a dual encoder.

    Raises:
        CheckpointError: not a model folder, damaged, or another format version.
        UsageError: it holds a classifier.
    """
    folder, description = _open_folder(folder, DUAL_ENCODER)
    where = str(folder / DESCRIPTION)
    config = from_tree(DualEncoderConfig, description["model"], where)
    preprocess = from_tree(PreprocessConfig, description["preprocess"], where)
    tokenizer = from_tree(TokenizerConfig, description["tokenizer"], where)
    if tokenizer.path:
        tokenizer.path = str(folder / tokenizer.path)
    model = build_dual_encoder(config, preprocess.mean, preprocess.std)
    load_weights(model, load_file(folder / WEIGHTS), where=str(folder / WEIGHTS))
    return LoadedModel(
        model=model.to(device).eval(),
        tokenizer=build_tokenizer(tokenizer, config.text.context_length),
        preprocess=preprocess,
        config=config,
        fingerprint=description["files"][WEIGHTS],
    )


def load_classifier(folder: str | Path, device: str | torch.device = "cpu") -> LoadedClassifier:
    """Load the model folder of a classifier.

    Raises:
        CheckpointError: not a model folder, damaged, or another format version.
        UsageError: it holds a dual encoder.
    """
    folder, description = _open_folder(folder, CLASSIFIER)
    where = str(folder / DESCRIPTION)
    config = from_tree(ClassifierConfig, description["model"], where)
    preprocess = from_tree(PreprocessConfig, description["preprocess"], where)
    model = build_classifier(config, description["class_names"], preprocess.mean, preprocess.std)
    load_weights(model, load_file(folder / WEIGHTS), where=str(folder / WEIGHTS))
    return LoadedClassifier(model.to(device).eval(), preprocess, config, description["files"][WEIGHTS])


def load_tower(folder: str | Path) -> LoadedTower:
    """Load the image tower of a model folder of any kind.

    Raises:
        CheckpointError: not a model folder, damaged, or another format version.
    """
    kind = model_kind(folder)
    if kind != TOWER:
        loaded = load_model(folder) if kind == DUAL_ENCODER else load_classifier(folder)
        return LoadedTower(loaded.model.image_tower, loaded.preprocess, loaded.config.image)
    folder, description = _open_folder(folder, TOWER)
    where = str(folder / DESCRIPTION)
    config = from_tree(TowerConfig, description["model"], where)
    tower = build_image_tower(config)
    load_weights(tower, load_file(folder / WEIGHTS), where=str(folder / WEIGHTS))
    return LoadedTower(tower.eval(), from_tree(PreprocessConfig, description["preprocess"], where), config)


def model_kind(folder: str | Path) -> str:
    """Return the kind of a model folder: DUAL_ENCODER, CLASSIFIER or TOWER; raises CheckpointError if it is not one."""
    return str(_description(find_model(folder))["kind"])


def model_fingerprint(folder: str | Path) -> str:
    """Return the SHA-256 of a model folder's weights file; raises CheckpointError if it is not a model folder."""
    return str(_description(find_model(folder))["files"][WEIGHTS])


def model_settings(folder: str | Path) -> dict[str, Any]:
    """Return the `kind` of a model folder and its settings in the form of configs: `model`, `preprocess`, `tokenizer`.

    `tokenizer` is None if it is not a dual encoder.

    Raises:
        CheckpointError: not a model folder, damaged, or another format version.
    """
    folder = find_model(folder)
    description = _description(folder)
    model = {"image": description["model"]} if description["kind"] == TOWER else description["model"]
    tokenizer = description.get("tokenizer")
    if tokenizer and tokenizer["path"]:
        tokenizer = tokenizer | {"path": str(folder / tokenizer["path"])}
    return {
        "kind": description["kind"],
        "model": model,
        "preprocess": description["preprocess"],
        "tokenizer": tokenizer,
    }


def save_tower(folder: Path, tower: Tower, config: TowerConfig, preprocess: PreprocessConfig) -> None:
    """Write a model folder with only an image tower, from which runs can start."""
    description = {"kind": TOWER, "model": asdict(config), "preprocess": asdict(preprocess)}
    _save_folder(folder, tower, description, {})


def check_place(folder: Path) -> None:
    """Raise UsageError if writing a model folder would replace something that is not a model folder."""
    if not (folder / DESCRIPTION).is_file():
        check_free(folder, "the output folder is not empty and not a model folder", replaced=True)


def _save_folder(folder: Path, model: nn.Module, description: dict[str, Any], files: Mapping[str, bytes]) -> None:
    check_place(folder)
    fresh = successor(folder)
    weights = model.state_dict()
    remove_leftovers(folder.parent, fresh.name)
    with disk_for([weights], folder):
        if fresh.exists() and not folder.exists():
            fresh.rename(folder)  # a run was killed just before this rename
        elif fresh.exists():
            remove_folder(fresh)
        with atomic_folder(fresh) as building:
            write_tensors(weights, building / WEIGHTS)
            for name, content in files.items():
                (building / name).write_bytes(content)
            fsync_tree(building)
            sealed = {"format_version": FORMAT_VERSION} | description | {"files": digests_of(building)}
            write_sealed(building / DESCRIPTION, sealed)
        _replace_folder(fresh, folder)


def _equal(fresh: Path, folder: Path) -> bool:
    """Return whether a model folder is whole and has the content of the fresh one."""
    try:
        description = _description(folder)
        verify_files(folder, description["files"], WEIGHTS)
    except CheckpointError:
        return False
    return description == _description(fresh)


def _open_folder(folder: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    folder = find_model(folder)
    description = _description(folder)
    check_kind(folder, description["kind"], kind)
    verify_files(folder, description["files"], WEIGHTS)
    return folder, description


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    description = read_sealed(path, *_KINDS.values())
    if description.keys() != _KINDS.get(description["kind"], {}).keys():
        raise CheckpointError(f"{folder.name} is damaged ({DESCRIPTION} is truncated or changed)", where=str(path))
    return description


def _replace_folder(fresh: Path, final: Path) -> None:
    """Replace `final` by `fresh`, which is not possible in one rename if `final` is not empty.

    In between only `fresh` exists, where `load_model` and the next `save_model` find it. An equal `final` stays.
    """
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if _equal(fresh, final):
        remove_folder(fresh)
        return
    if final.exists():
        final.rename(old)
    rename_synced(fresh, final)
    shutil.rmtree(old, ignore_errors=True)
