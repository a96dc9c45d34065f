"""Where a model is: its folder, or the folder of the run that wrote it. Nothing here imports torch."""

import json
from pathlib import Path

from data_tools.core.errors import UsageError, WrongPathError
from data_tools.core.near import near_path

DESCRIPTION = "mmvit.json"
DUAL_ENCODER = "dual_encoder"
CLASSIFIER = "classifier"
TOWER = "image_tower"

_NAMES = {DUAL_ENCODER: "a dual encoder", CLASSIFIER: "a classifier", TOWER: "an image tower"}
_VERBS = {DUAL_ENCODER: "zero-shot", CLASSIFIER: "classify", TOWER: "finetune CONFIG train.init=FOLDER"}
_PREFIXES = ("hf:", "timm:", "open_clip:")


def find_model(place: str | Path, kind: str | None = None) -> Path:
    """Return the model folder at a place: the folder itself, or model/ in the folder of a run.

    Args:
        place: what a user names.
        kind: DUAL_ENCODER or CLASSIFIER, if only such a model can be used.

    Raises:
        WrongPathError: there is none; the hint is the model or the command that was meant.
        UsageError: it is of another kind.
    """
    folder = Path(place)
    for found in (folder, folder / "model"):
        if not found.exists() and successor(found).is_dir():
            found = successor(found)  # a run was killed while it replaced an older model folder
        if (found / DESCRIPTION).is_file():
            if kind:
                check_kind(found, _kind(found), kind)
            return found
    raise _missing(folder)


def check_kind(folder: Path, found: str | None, kind: str) -> None:
    """Raise UsageError if a model is of another kind, with the verb that takes it."""
    if found in _NAMES and found != kind:
        what = f"the model folder contains {_NAMES[found]}, but {_NAMES[kind]} is needed"
        raise UsageError(what, where=str(folder), hint=f"use it with mmvit {_VERBS[found]}")


def successor(folder: Path) -> Path:
    """Return the temporary path of a finished model folder, just before it replaces `folder`."""
    return folder.with_name(f".{folder.name}.new")


def _kind(folder: Path) -> str | None:
    """Return the kind that a model folder names; None if the file is damaged, which loading it reports."""
    try:
        return str(json.loads((folder / DESCRIPTION).read_text("utf-8"))["kind"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _missing(folder: Path) -> WrongPathError:
    near = "" if folder.exists() else _near(folder)
    run = next((each for each in (folder, *folder.parents) if (each / "config.yaml").is_file()), None)
    if near and (run is None or near.startswith("did you mean")):
        return WrongPathError("not a model folder: it does not exist", where=str(folder), hint=near)
    if run and (run / "model" / DESCRIPTION).is_file():
        return WrongPathError("not a model folder", where=str(folder), hint=f"the model of the run: {run / 'model'}")
    if run:
        verb = "pretrain" if "\ntokenizer:" in (run / "config.yaml").read_text("utf-8", "replace") else "finetune"
        hint = f"let it run to its end: mmvit {verb} {run / 'config.yaml'}; mmvit status {run} shows where it is"
        return WrongPathError("not a model folder: the run has no model yet", where=str(folder), hint=hint)
    if folder.is_file():
        hint = "MODEL comes before the images: the folder of a run, or what mmvit import wrote"
        return WrongPathError("not a model folder but a file", where=str(folder), hint=hint)
    note = f"a model folder contains {DESCRIPTION} and model.safetensors"
    inside = sorted(path.parent for path in folder.glob("*/model/" + DESCRIPTION))
    hint = f"did you mean {inside[-1].parent}?" if inside else "pass the folder of a run, or what mmvit import wrote"
    return WrongPathError("not a model folder", where=str(folder), note=note, hint=hint)


def _near(folder: Path) -> str:
    name = str(folder)
    if name.startswith(_PREFIXES):
        return f"import it first: mmvit import {name} OUT; then pass OUT"
    near = near_path(folder)
    if near:
        return near
    if folder.is_absolute() or len(folder.parts) > 2 or name.startswith("runs"):
        return "pass the folder of a run, or what mmvit import wrote"
    source = f"hf:{name}" if len(folder.parts) == 2 else f"open_clip:{name}/TAG"
    return f"a model of another library is imported first: mmvit import {source} OUT; then pass OUT"
