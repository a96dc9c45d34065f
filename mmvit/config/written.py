"""Text keys as they are written: YAML reads 0123 as 83, 2024-01-01 as a date, no as false."""

import dataclasses
import json
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from mmvit.models.config import tower_config
from mmvit.towers.config import TowerConfig

# The parser of omegaconf: that of libyaml reads more, such as "?" in a list of URLs.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL = (None, "", "~")  # what a missing value looks like


class _TextLoader(_Loader):
    """Reads each unquoted scalar as the text that it is."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":merge")]
        for first, resolvers in _Loader.yaml_implicit_resolvers.items()
    }


def read_written(text: str) -> Any:
    """Return the data of a YAML text with all unquoted scalars as text."""
    loader = _TextLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def written_override(override: str) -> str:
    """Return a `key=value` argument with each scalar of its value quoted."""
    key, _, value = override.partition("=")
    return f"{key}={json.dumps(read_written(value), ensure_ascii=False)}"


def keep_text(base: Any, tree: Any, written: Any) -> Any:
    """Return the values of a tree, those of text keys as they were written.

    Args:
        base: the config that the tree describes, with its defaults.
        tree: plain dicts and lists, as YAML reads them.
        written: the same from `read_written`.
    """
    if not isinstance(tree, dict) or not isinstance(written, dict):
        return tree
    if isinstance(base, TowerConfig):
        try:
            base = tower_config(str(written.get("kind", base.kind)))
        except ValueError:
            return tree  # reported by the validation
    kinds = {entry.name: entry.type for entry in dataclasses.fields(base)}
    return {
        key: _kept(kinds[key], getattr(base, key), value, written.get(key)) if key in kinds else value
        for key, value in tree.items()
    }


def _kept(kind: Any, base: Any, value: Any, written: Any) -> Any:
    if is_dataclass(kind):
        return keep_text(base, value, written)
    items = get_args(kind)
    if get_origin(kind) is list and isinstance(value, list) and isinstance(written, list):
        of_item = items[0]
        item = of_item() if isinstance(of_item, type) and is_dataclass(of_item) else None
        return [_kept(of_item, item, each, text) for each, text in zip(value, written, strict=False)]
    if get_origin(kind) is dict and isinstance(value, dict) and isinstance(written, dict):
        return dict(zip(written, value.values(), strict=False)) if len(value) == len(written) else value
    if value is None and (type(None) in items or written in _NULL):
        return None
    if _is_text(kind) and not isinstance(value, dict | list) and written is not None:
        return str(written)
    return value


def _is_text(kind: Any) -> bool:
    """Return whether a type is text, a choice of texts, one of them or None, or a list of them."""
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    parts = [part for part in get_args(kind) if part is not type(None)]
    return kind is str or (len(parts) == 1 and _is_text(parts[0]) and get_origin(kind) is not dict)
