"""Folders that survive a crash: training checkpoints and model folders, each with the SHA-256 of its files."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.atomic import atomic_folder, fsync_dir
from data_tools.errors import CheckpointError, ResourceError, UsageError
from mmvit.config import from_tree
from mmvit.data.tokenizers import TOKENIZER_FILE, Tokenizer, TokenizerConfig, build_tokenizer, resolve_tokenizer
from mmvit.data.transforms import PreprocessConfig
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DESCRIPTION = "mmvit.json"
WEIGHTS = "model.safetensors"

logger = logging.getLogger(__name__)


class OtherVersionError(CheckpointError):
    """A folder of another format version: whole, but not for this version to read."""


class Checkpoint(NamedTuple):
    """A checkpoint read back: `tensors` by file stem ("model", "optimizer", "random"), `state` as it was given."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class LoadedModel(NamedTuple):
    """A model folder read back; `fingerprint` is the SHA-256 of the weights file."""

    model: DualEncoder
    tokenizer: Tokenizer
    preprocess: PreprocessConfig
    config: DualEncoderConfig
    fingerprint: str


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep_last: int
) -> Path:
    """Write `run/checkpoints/step-NNNNNNNN` and only then remove all but the newest `keep_last`.

    The folder is built beside its final name, synced and renamed; its manifest is written last. A crash leaves
    either no such folder or a whole one. Removed too are later steps, which this run could not read and repeats,
    and what a killed save left.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    if final.exists():  # a damaged copy of this very step, passed over by `latest_checkpoint`
        shutil.rmtree(final)
    _remove_leftovers(final.parent, "step-*")
    with atomic_folder(final) as folder:
        for name, group in tensors.items():
            _write_tensors(group, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps(dict(state), indent=1))
        _write_manifest(folder, step=step)
    kept = [path for path in _checkpoint_folders(run) if path.name <= final.name][-max(keep_last, 1) :]
    for path in _checkpoint_folders(run):
        if path not in kept:
            shutil.rmtree(path)
    return final


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint, None where there is none; a damaged one is named in the log and passed over.

    Raises:
        OtherVersionError: the newest is of another format version; going on without it would destroy it.
    """
    for folder in reversed(_checkpoint_folders(run)):
        try:
            return read_checkpoint(folder)
        except OtherVersionError:
            raise
        except CheckpointError as error:
            logger.warning("%s\n  meaning: passed over, the next older one is tried", error)
    if _checkpoint_folders(run):
        logger.warning("no checkpoint of this run can be read: it starts anew")
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint; raises CheckpointError where a file is missing, cut or changed."""
    manifest = verify_folder(folder)
    names = [name for name in manifest["files"] if name.endswith(".safetensors")]
    tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in names}
    state = json.loads((folder / "state.json").read_text())
    return Checkpoint(folder, manifest["step"], tensors, state)


def verify_folder(folder: Path) -> dict[str, Any]:
    """Hold every file against the folder's manifest and return it; raises CheckpointError naming the file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("checkpoint has no readable manifest", where=str(folder / MANIFEST)) from error
    if version != FORMAT_VERSION:
        raise OtherVersionError(
            f"checkpoint format version {version} is not {FORMAT_VERSION}",
            where=str(folder),
            meaning="nothing was changed",
            mend="use the version of mmvit that wrote it, or start anew with another out=FOLDER",
        )
    _verify_files(folder, files)
    return manifest


def save_model(
    folder: Path,
    model: DualEncoder,
    config: DualEncoderConfig,
    preprocess: PreprocessConfig,
    tokenizer: TokenizerConfig,
) -> None:
    """Write a model folder that `load_model` reads with nothing else; an older model folder is replaced."""
    if folder.exists() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise UsageError("the output folder holds something else", where=str(folder), mend="name another folder")
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    _remove_leftovers(folder.parent, fresh.name)
    with atomic_folder(fresh) as building:
        _write_tensors(model.state_dict(), building / WEIGHTS)
        if tokenizer.kind == "file":
            tokenizer = resolve_tokenizer(tokenizer)
            shutil.copyfile(tokenizer.path, building / TOKENIZER_FILE)
        description = {
            "format_version": FORMAT_VERSION,
            "kind": "dual_encoder",
            "model": asdict(config),
            "preprocess": asdict(preprocess),
            "tokenizer": asdict(replace(tokenizer, path=TOKENIZER_FILE if tokenizer.kind == "file" else "")),
            "files": {path.name: file_sha256(path) for path in sorted(building.iterdir())},
        }
        (building / DESCRIPTION).write_text(json.dumps(description, indent=2))
    _replace_folder(fresh, folder)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Read a model folder; raises CheckpointError where it is none, damaged, or of another format version."""
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        version, files, fingerprint = description["format_version"], description["files"], description["files"][WEIGHTS]
        trees = [description[name] for name in ("model", "preprocess", "tokenizer")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "this is not a model folder",
            where=str(folder),
            meaning=f"a model folder holds {DESCRIPTION} and {WEIGHTS}",
            mend="give the model/ folder that a run writes",
        ) from error
    if version != FORMAT_VERSION:
        raise OtherVersionError(
            f"model format version {version} is not {FORMAT_VERSION}",
            where=str(folder),
            mend="use the version of mmvit that wrote it",
        )
    _verify_files(folder, files)
    where = str(folder / DESCRIPTION)
    config = from_tree(DualEncoderConfig, trees[0], where)
    preprocess = from_tree(PreprocessConfig, trees[1], where)
    tokenizer = from_tree(TokenizerConfig, trees[2], where)
    if tokenizer.path:
        tokenizer.path = str(folder / tokenizer.path)
    model = build_dual_encoder(config, preprocess.mean, preprocess.std)
    load_weights(model, load_file(folder / WEIGHTS), where=str(folder / WEIGHTS))
    return LoadedModel(
        model.to(device).eval(), build_tokenizer(tokenizer, config.text.context_length), preprocess, config, fingerprint
    )


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    except SafetensorError as error:  # the library's word for a full disk, too
        raise ResourceError(
            f"tensors cannot be written: {error}",
            where=str(path),
            meaning="nothing that was saved before is lost",
            mend=f"make room ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there) and run again",
        ) from error


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into the model; raises CheckpointError naming the first that is missing, left over or misshapen."""
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"weights do not fit the model: {str(error).splitlines()[1].strip()}",
            where=where,
            meaning="they belong to another architecture",
            mend="use the config that the weights were trained with",
        ) from error


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_files(folder: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError("a file is missing", where=str(path))
        if file_sha256(path) != digest:
            raise CheckpointError("a file is cut or changed", where=str(path))


def _checkpoint_folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _remove_leftovers(parent: Path, name: str) -> None:
    """Remove the unfinished folders that killed processes left beside `parent/name`."""
    for path in parent.glob(f".{name}.tmp-*"):
        shutil.rmtree(path)


def _write_manifest(folder: Path, **facts: Any) -> None:
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, **facts, "files": files}, indent=1))


def _replace_folder(fresh: Path, final: Path) -> None:
    """Put `fresh` in the place of `final`, which no rename can do at once when `final` is full."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    fsync_dir(final.parent)
    shutil.rmtree(old, ignore_errors=True)
