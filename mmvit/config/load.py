"""Configs from YAML and from the command line, and back."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_tools.core.errors import UsageError, did_you_mean
from mmvit.data.prompts import configs_folder
from mmvit.models.image_towers import tower_config
from mmvit.towers.contract import TowerConfig
from mmvit.towers.vit import ViTConfig

Config = TypeVar("Config")


def load_config(cls: type[Config], source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (a path, or a name under configs/), apply `key=value` overrides, check keys and types."""
    return from_tree(cls, read_tree(source, overrides), where=config_place(source, overrides))


def config_place(source: str | Path, overrides: Sequence[str]) -> str:
    """Return where the values of a config stand, for errors."""
    return f"{find_config(source)}{', or the command line' if overrides else ''}"


def read_tree(source: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a YAML file and apply overrides, as plain dicts and lists: keys and types are not checked yet."""
    path = find_config(source)
    try:
        tree = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config cannot be read: {error}", where=str(path)) from error
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if keys.count(key) > 1:
            hint = f"quote the whole argument if it has braces: '{key}=...'"
            raise UsageError(f"{key} is given {keys.count(key)} times", where=key, hint=hint)
    for override in overrides:
        tree = _override(tree, override)
    return OmegaConf.to_container(tree)


def _override(tree: Any, override: str) -> Any:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r} is not key=value", hint="for example train.batch_size=512")
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([override if value else f"{key}=''"]))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        hint = "quote a value with braces, brackets or colons as YAML wants it"
        raise UsageError(f"override {override!r} cannot be read: {reason}", where=key, hint=hint) from error


def from_tree(cls: type[Config], tree: Any, where: str) -> Config:
    """Make the dataclass `cls` of plain dicts and lists; raises UsageError naming the key that does not fit."""
    return cast(Config, _fitted(cls, _checked(cls, tree, where), where))


def _fitted(schema: Any, tree: Any, where: str, prefix: str = "") -> Any:
    base = copy.deepcopy(_structured(schema)) if isinstance(schema, type) else OmegaConf.structured(schema)
    _place_towers(base, tree)
    try:
        return OmegaConf.to_object(OmegaConf.merge(base, tree))
    except OmegaConfBaseException as error:
        key = f" {prefix}{error.full_key}" if getattr(error, "full_key", None) else ""
        reason, hint = str(error).splitlines()[0], None
        if "is not a ListConfig" in reason:
            reason, hint = "it takes a list", f"{key.strip()}=[SMALLEST,LARGEST] for a range, or null"
        raise UsageError(f"config value{key} does not fit: {reason}", where=where, hint=hint) from error


@cache
def _structured(schema: type) -> Any:
    """Read the dataclasses, which takes five times as long as a copy of the result."""
    return OmegaConf.structured(schema)


def _place_towers(base: Any, tree: Any) -> None:
    """Put image towers of another kind in the place of the default: they cannot be merged into it."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, TowerConfig):
            base[key] = value
        elif isinstance(value, dict) and OmegaConf.is_dict(base[key]):
            _place_towers(base[key], value)


def to_yaml(config: Any) -> str:
    """Write a config as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def find_config(source: str | Path) -> Path:
    """Return the file itself, or the one of that name under configs/; raises UsageError with the nearest name."""
    path = Path(source)
    builtin = configs_folder() / f"{str(source).removesuffix('.yaml')}.yaml"
    for candidate in (path, builtin):
        if candidate.is_file():
            return candidate
    names = [str(file.relative_to(configs_folder()).with_suffix("")) for file in configs_folder().rglob("*.yaml")]
    hint = did_you_mean(str(source), names) or f"built-in configs: {', '.join(sorted(names))}"
    raise UsageError(f"there is no config {str(source)!r}", hint=hint)


def _checked(cls: Any, tree: Any, where: str, prefix: str = "") -> Any:
    """Return the tree, a single value for a list made a list of one, "" an empty one; UsageError for an unknown key.

    An image tower becomes its kind's own config, with what the tree names in the place of that kind's values.
    """
    if not isinstance(tree, dict):
        what = f"config value {prefix[:-1]}" if prefix else "the config"
        raise UsageError(f"{what} does not fit: {tree!r:.50} is no mapping of keys to values", where=where)
    if cls is TowerConfig:
        preset = _preset(tree, where, f"{prefix}kind")
        return _fitted(preset, _checked(type(preset), tree, where, prefix), where, prefix)
    kinds: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(cls)}
    checked = {}
    for key, value in tree.items():
        if key not in kinds:
            hint = did_you_mean(str(key), kinds) or f"keys here: {', '.join(kinds)}"
            of = f", which {tree['kind']} does not have" if issubclass(cls, TowerConfig) and "kind" in tree else ""
            raise UsageError(f"unknown config key {prefix}{key}{of}", where=where, hint=hint)
        kind = kinds[key]
        if get_origin(kind) is list:
            items = value if isinstance(value, list) else [] if value == "" else [value]
            (item_kind,) = get_args(kind)
            value = [
                _checked(item_kind, item, where, f"{prefix}{key}[{i}].") if is_dataclass(item_kind) else item
                for i, item in enumerate(items)
            ]
        checked[key] = _checked(kind, value, where, f"{prefix}{key}.") if is_dataclass(kind) else value
    return checked


def _preset(tree: dict[str, Any], where: str, key: str) -> TowerConfig:
    try:
        return tower_config(str(tree.get("kind", ViTConfig.kind)))
    except ValueError as error:
        raise UsageError(str(error), where=f"{where}, {key}") from error
