"""Folders that survive a crash: training checkpoints and model folders, each with the SHA-256 of its files."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.atomic import atomic_folder, fsync_tree, make_folder, remove_folder, remove_leftovers, rename_synced
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
STATE = "state.json"
SLACK = 2**16  # bytes of the small files beside the tensors
_NO_DIGEST = "0" * 64

logger = logging.getLogger(__name__)


class OtherVersionError(CheckpointError):
    """A folder of another format version: whole, but not for this version to read."""


class Checkpoint(NamedTuple):
    """A checkpoint read back: `tensors` by file stem ("model", "optimizer", "ema"), `state` as it was given."""

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
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int,
    keep_every: int | None = None,
) -> Path:
    """Write `run/checkpoints/step-NNNNNNNN` and only then remove those that are no longer wanted.

    Wanted are the newest `keep_last`, and all whose step is a multiple of `keep_every`. The folder is built beside its
    final name, synced and renamed; its manifest is written last. A crash leaves either no such folder or a whole one.
    Removed too are later steps, which this run could not read and repeats, and what a killed save left. A whole
    checkpoint of this very step stays as it is.

    Raises:
        ResourceError: the disk is full or fails; what was saved before is as it was.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    remove_leftovers(final.parent, "step-*")
    if not (final.exists() and _is_whole(final)):
        with _disk_for(tensors.values(), final):
            if final.exists():
                remove_folder(final)
            with atomic_folder(final) as folder:
                for name, group in tensors.items():
                    _write_tensors(group, folder / f"{name}.safetensors")
                (folder / STATE).write_text(json.dumps(dict(state), indent=1))
                fsync_tree(folder)
                facts = {"format_version": FORMAT_VERSION, "step": step, "files": _digests(folder)}
                _write_sealed(folder / MANIFEST, facts)
    _prune(run, step, keep_last, keep_every)
    return final


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint, None where there is none; what is passed over, and why, is told in the log.

    Raises:
        OtherVersionError: the newest is of another format version; going on without it would destroy it.
        ResourceError: the disk does not give one; it may be whole.
        CheckpointError: there are some, and none is whole.
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
        whats = "; ".join(error.what for _, error in damaged)
        raise CheckpointError(
            f"none of the checkpoints of this run is whole: {whats}",
            where=str(run / "checkpoints"),
            meaning="nothing was changed",
            mend="move that folder away to start the run anew",
        )
    start = found.step if found else 0
    for step, why in damaged:
        instead = f"going on at step {start}, {step - start} steps are repeated"
        logger.warning("%s; %s\n  where: %s", why.what, instead, why.where)
    return found


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint; raises CheckpointError where a file is missing, cut or changed."""
    manifest = verify_folder(folder)
    names = [name for name in manifest["files"] if name.endswith(".safetensors")]
    try:
        tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in names}
        state = json.loads((folder / STATE).read_text())
    except OSError as error:
        raise _unreadable(folder, error) from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder.name} cannot be read: {error}", where=str(folder)) from error
    return Checkpoint(folder, manifest["step"], tensors, state)


def check_leaves(checkpoint: Checkpoint, groups: Collection[str], state: Collection[str]) -> None:
    """Raise CheckpointError unless the checkpoint holds just these groups of tensors, and no other entry of `state`.

    What a run does not take up again it would lose silently; entries that an older version did not write may lack.
    """
    unknown = sorted({*checkpoint.tensors} - {*groups} | {*checkpoint.state} - {*state})
    missing = sorted({*groups} - {*checkpoint.tensors})
    if unknown or missing:
        what = f"has {', '.join(unknown)}, which this run does not" if unknown else f"lacks {', '.join(missing)}"
        raise CheckpointError(
            f"{checkpoint.folder.name} {what}",
            where=str(checkpoint.folder),
            meaning="going on would lose a part of the state; nothing was changed",
            mend="use the version of mmvit and the config that wrote it, or start anew with another out=FOLDER",
        )


def verify_folder(folder: Path) -> dict[str, Any]:
    """Hold every file against the folder's manifest and return it; raises CheckpointError naming the file."""
    manifest = _read_sealed(folder / MANIFEST, {"format_version": int, "step": int, "files": dict})
    _verify_files(folder, manifest["files"], STATE)
    return manifest


def save_model(
    folder: Path,
    model: DualEncoder,
    config: DualEncoderConfig,
    preprocess: PreprocessConfig,
    tokenizer: TokenizerConfig,
) -> None:
    """Write a model folder that `load_model` reads with nothing else; an older model folder is replaced."""
    if folder.exists() and not (folder / DESCRIPTION).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UsageError("the output folder holds something else", where=str(folder), mend="name another folder")
    fresh = _successor(folder)
    weights = model.state_dict()
    remove_leftovers(folder.parent, fresh.name)
    with _disk_for([weights], folder):
        if fresh.exists() and not folder.exists():
            fresh.rename(folder)  # a killed run got no further
        elif fresh.exists():
            remove_folder(fresh)
        with atomic_folder(fresh) as building:
            _write_tensors(weights, building / WEIGHTS)
            if tokenizer.kind == "file":
                tokenizer = resolve_tokenizer(tokenizer)
                (building / TOKENIZER_FILE).write_bytes(Path(tokenizer.path).read_bytes())
            fsync_tree(building)
            description = {
                "format_version": FORMAT_VERSION,
                "kind": "dual_encoder",
                "model": asdict(config),
                "preprocess": asdict(preprocess),
                "tokenizer": asdict(replace(tokenizer, path=TOKENIZER_FILE if tokenizer.kind == "file" else "")),
                "files": _digests(building),
            }
            _write_sealed(building / DESCRIPTION, description)
        _replace_folder(fresh, folder)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Read a model folder; raises CheckpointError where it is none, damaged, or of another format version."""
    folder = Path(folder)
    if not folder.exists() and _successor(folder).is_dir():
        folder = _successor(folder)  # a run was killed as it put this one in the place of an older one
    if not (folder / DESCRIPTION).is_file():
        raise CheckpointError(
            "this is not a model folder",
            where=str(folder),
            meaning=f"a model folder holds {DESCRIPTION} and {WEIGHTS}",
            mend="give the model/ folder that a run writes",
        )
    kinds = {"format_version": int, "kind": str, "model": dict, "preprocess": dict, "tokenizer": dict, "files": dict}
    description = _read_sealed(folder / DESCRIPTION, kinds)
    _verify_files(folder, description["files"], WEIGHTS)
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


@contextlib.contextmanager
def _disk_for(groups: Iterable[Mapping[str, Tensor]], final: Path) -> Iterator[None]:
    """Make the folder that `final` stands in, for a block that writes the tensors there.

    Raises:
        ResourceError: they do not fit there, or the block could not write them.
    """
    needed = sum(tensor.nbytes for group in groups for tensor in group.values()) + SLACK
    free = 0
    try:
        make_folder(final.parent)
        free = shutil.disk_usage(final.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{final.name} cannot be written: {error}",
            where=str(final),
            meaning=f"it needs {needed:,} bytes, and {free:,} are free there; nothing that was saved before is lost",
            mend="make room and run the same command again",
        ) from error


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    with contextlib.suppress(OSError):  # there are file systems without modes
        path.chmod(path.parent.stat().st_mode & 0o666)  # the library lets nobody but the owner read it


def _write_sealed(path: Path, tree: Mapping[str, Any]) -> None:
    """Write JSON that holds the SHA-256 of its own text, taken with zeros in the digest's place."""
    text = json.dumps({**tree, "sha256": _NO_DIGEST}, indent=1)
    path.write_text(text.replace(_NO_DIGEST, hashlib.sha256(text.encode()).hexdigest()))


def _read_sealed(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Read what `_write_sealed` wrote; folders from before there was a seal have none.

    Every version seals in this way: what is damaged must not look like another version, nor the other way round.
    """
    folder = path.parent.name
    try:
        text = path.read_text()
        tree = json.loads(text)
        digest = tree.pop("sha256", None)
        intact = digest is None or hashlib.sha256(text.replace(digest, _NO_DIGEST).encode()).hexdigest() == digest
        version = tree["format_version"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is incomplete ({path.name} is missing)", where=str(path)) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({path.name} cannot be read)", where=str(path)) from error
    if intact and version != FORMAT_VERSION:
        raise OtherVersionError(
            f"{folder} has format version {version}, not {FORMAT_VERSION}",
            where=str(path),
            meaning="nothing was changed",
            mend="use the version of mmvit that wrote it",
        )
    if not intact or {key: type(value) for key, value in tree.items()} != dict(kinds):
        raise CheckpointError(
            f"{folder} is damaged ({path.name} is cut or changed)",
            where=str(path),
            mend='to change it by hand, remove its line "sha256" too' if not intact else None,
        )
    return cast(dict[str, Any], tree)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def _verify_files(folder: Path, digests: Mapping[str, str], wanted: str) -> None:
    for name, digest in {wanted: None, **digests}.items():
        path = folder / name
        try:
            intact = Path(name).name == name and file_sha256(path) == digest  # no file of another folder
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder.name} is incomplete ({name} is missing)", where=str(path)) from error
        except OSError as error:
            raise _unreadable(path, error) from error
        if not intact:
            raise CheckpointError(f"{folder.name} is damaged ({name} is cut or changed)", where=str(path))


def _unreadable(path: Path, error: OSError) -> ResourceError:
    """What a disk does not give may be whole: to pass it over would be to lose it."""
    return ResourceError(
        f"{path.name} cannot be read: {error.strerror or error}",
        where=str(path),
        meaning="nothing was changed",
        mend="look at the disk, then run again",
    )


def _is_whole(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except OtherVersionError:
        raise
    except CheckpointError:
        return False
    return True


def _checkpoint_folders(run: Path) -> dict[int, Path]:
    """Return the folders by step, the oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")}
    return dict(sorted((int(step), path) for path, step in steps.items() if step.isdecimal()))


def _prune(run: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    folders = _checkpoint_folders(run)
    wanted = {each for each in folders if each <= step and keep_every and each % keep_every == 0}
    wanted.update([each for each in folders if each <= step][-max(keep_last, 1) :])
    for each in folders.keys() - wanted:
        try:
            remove_folder(folders[each])
        except OSError as error:  # the next save tries again
            logger.warning("an old checkpoint cannot be removed: %s", error)


def _successor(folder: Path) -> Path:
    """Where a whole model folder stands just before it takes the place of `folder`."""
    return folder.with_name(f".{folder.name}.new")


def _replace_folder(fresh: Path, final: Path) -> None:
    """Put `fresh` in the place of `final`, which no rename can do at once when `final` is full.

    In between there is only `fresh`, which `load_model` and the next `save_model` know.
    """
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    rename_synced(fresh, final)
    shutil.rmtree(old, ignore_errors=True)
