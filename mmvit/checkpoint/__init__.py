"""Crash-safe folders: training checkpoints and model folders, each with the SHA-256 of its files."""

from mmvit.checkpoint.checkpoints import (
    Checkpoint,
    check_leaves,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    verify_folder,
)
from mmvit.checkpoint.models import (
    LoadedClassifier,
    LoadedModel,
    LoadedTower,
    check_place,
    load_classifier,
    load_model,
    load_tower,
    model_fingerprint,
    model_kind,
    model_settings,
    save_classifier,
    save_model,
    save_tower,
)
from mmvit.checkpoint.sealed import WEIGHTS, OtherVersionError, file_sha256, load_weights
from mmvit.model_folder import CLASSIFIER, DESCRIPTION, DUAL_ENCODER, TOWER

__all__ = [
    "CLASSIFIER",
    "DESCRIPTION",
    "DUAL_ENCODER",
    "TOWER",
    "WEIGHTS",
    "Checkpoint",
    "LoadedClassifier",
    "LoadedModel",
    "LoadedTower",
    "OtherVersionError",
    "check_leaves",
    "check_place",
    "file_sha256",
    "latest_checkpoint",
    "load_classifier",
    "load_model",
    "load_tower",
    "load_weights",
    "model_fingerprint",
    "model_kind",
    "model_settings",
    "read_checkpoint",
    "save_checkpoint",
    "save_classifier",
    "save_model",
    "save_tower",
    "verify_folder",
]
