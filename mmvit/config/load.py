"""Configs from YAML and from the command line, and back."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_tools.core.errors import UsageError, did_you_mean
from mmvit.config.validate import refuse, validate
from mmvit.data.prompts import configs_folder
from mmvit.keys import Problem

Config = TypeVar("Config")

logger = logging.getLogger(__name__)


def load_config(
    cls: type[Config], source: str | Path, overrides: Sequence[str] = (), *, complete: bool = True
) -> Config:
    """Read a YAML file (a path, or a name under configs/), apply `key=value` overrides, validate all keys.

    Args:
        cls: the class of the config.
        source: the YAML file.
        overrides: they override the file; if a key is given several times, the last one wins.
        complete: apply the rules between keys too; False for a recipe with open keys that the caller fills in later.

    Raises:
        UsageError: with all problems of the config at once.
    """
    tree = read_tree(source, overrides, cls)
    return from_tree(cls, tree, where=config_place(source, overrides), complete=complete)


def config_place(source: str | Path, overrides: Sequence[str]) -> str:
    """Return the source of the values of a config, for errors."""
    return f"{find_config(source)}{' or the command line' if overrides else ''}"


def read_tree(source: str | Path, overrides: Sequence[str] = (), cls: type | None = None) -> Any:
    """Read a YAML file and apply overrides, as plain dicts and lists: keys and types are not validated yet.

    `${...}` is replaced by the value of another key; `cls` is the class of the config, whose defaults it may use too.
    """
    path = find_config(source)
    try:
        tree = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config cannot be read: {error}", where=str(path)) from error
    counts = Counter(override.partition("=")[0] for override in overrides)
    for key in (key for key, count in counts.items() if count > 1):  # as a shell expands unquoted braces
        logger.warning("%s is given %d times; the last one wins", key, counts[key])
    problems = []
    for override in overrides:
        try:
            tree = _override(tree, override)
        except UsageError as error:
            problems.append(Problem(error.where or override, error.what, error.hint))
    refuse(problems, "the command line")
    return _resolved(tree, cls, str(path))


def _override(tree: Any, override: str) -> Any:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r} is not key=value", hint="for example train.batch_size=512")
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([override if value else f"{key}=''"]))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        hint = "quote values with braces, brackets or colons as in YAML"
        raise UsageError(f"override {override!r} cannot be read: {reason}", where=key, hint=hint) from error


def _resolved(tree: Any, cls: type | None, where: str) -> Any:
    """Return plain dicts and lists with each `${...}` replaced by its value."""
    plain = OmegaConf.to_container(tree)
    if "${" not in str(plain):
        return plain
    try:
        whole = tree if cls is None else OmegaConf.merge(OmegaConf.create(asdict(cls())), tree)
        return _picked(plain, OmegaConf.to_container(whole, resolve=True))
    except OmegaConfBaseException as error:
        key, reason = getattr(error, "full_key", None), str(error).splitlines()[0]
        raise UsageError(f"{key or 'a value'} cannot be resolved: {reason}", where=where) from error


def _picked(keys: Any, whole: Any) -> Any:
    """Return the part of `whole` that has the keys of `keys`."""
    if not isinstance(keys, dict):
        return whole
    return {key: _picked(value, whole[key]) for key, value in keys.items()}


def from_tree(cls: type[Config], tree: Any, where: str, *, complete: bool = True) -> Config:
    """Build the dataclass `cls` from plain dicts and lists; raise UsageError with all problems at once."""
    config, problems = validate(cls, tree, complete=complete)
    refuse(problems, where)
    return config


def to_yaml(config: Any) -> str:
    """Return a config as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def find_config(source: str | Path) -> Path:
    """Return the file itself, or the one of that name under configs/; raise UsageError with the closest name."""
    path = Path(source)
    builtin = configs_folder() / f"{str(source).removesuffix('.yaml')}.yaml"
    for candidate in (path, builtin):
        if candidate.is_file():
            return candidate
    names = [str(file.relative_to(configs_folder()).with_suffix("")) for file in configs_folder().rglob("*.yaml")]
    hint = did_you_mean(str(source), names) or f"built-in configs: {', '.join(sorted(names))}"
    raise UsageError(f"there is no config {str(source)!r}", hint=hint)
