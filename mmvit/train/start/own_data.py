"""What a built-in recipe says about its own data set, replaced when the user names another one."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.core.errors import MmvitError
from data_tools.tar.expand import expand_shards
from mmvit.config import find_config
from mmvit.config.builtin import verb_of
from mmvit.data.prompts import configs_folder

CLASS_FILES = ("classnames.txt", "classes.txt")  # as `mmvit-data make` and the demo data sets write them

logger = logging.getLogger(__name__)


def with_own_captions(tree: Any, source: str | Path, overrides: Sequence[str]) -> Any:
    """Return the values of a recipe for the data that the command line names: their captions are in `txt`."""
    given = {override.partition("=")[0] for override in overrides}
    data = tree.get("data") if isinstance(tree, dict) else None
    is_recipe = find_config(source).resolve().is_relative_to(configs_folder().resolve())
    if not isinstance(data, dict) or "captions" not in data or "data.train" not in given or not is_recipe:
        return tree
    if any(key.startswith("data.captions") for key in given):
        return tree
    logger.info("captions: the txt of each sample, instead of those of %s; data.captions=... chooses others", source)
    return tree | {"data": {key: value for key, value in data.items() if key != "captions"}}


def for_own_data(tree: Any, source: str | Path, overrides: Sequence[str]) -> Any:
    """Return the values of a recipe for the data that the command line names, without what belongs to the recipe's.

    The class names are those next to the data, or in them; a `validation.data` that does not exist is left out.
    """
    given = {override.partition("=")[0] for override in overrides}
    data = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(data, dict) or "data.train" not in given or verb_of(find_config(source)) is None:
        return tree
    before = str(tree.get("classes") or "")
    found = _classes(data.get("train"), before)
    if found != before and "classes" not in given:
        logger.info("classes: %s, instead of %s", found or "taken from the data", before or "those in the data")
        tree = tree | {"classes": found}
    validation = tree.get("validation")
    theirs = isinstance(validation, dict) and not any(key.startswith("validation") for key in given)
    if theirs and validation.get("data") and not _exists(validation["data"]):
        logger.info("no accuracy is measured: validation.data=PATH names labelled images to measure it on")
        tree = tree | {"validation": validation | {"data": []}}
    return tree


def _classes(train: Any, before: str) -> str:
    first = Path(str(train[0] if isinstance(train, list) and train else train))
    folder = first if first.is_dir() else first.parent
    names = next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    if names is not None:
        return str(names)
    of_folders = first.is_dir() and not any(first.glob("*.tar"))
    return "" if of_folders or not Path(before).is_file() else before


def _exists(spec: Any) -> bool:
    try:
        return Path(str(spec)).exists() or bool(expand_shards(spec))
    except MmvitError:
        return False
