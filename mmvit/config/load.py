"""Configs from YAML and from the command line, and back."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_tools.core.errors import UsageError
from mmvit.config.builtin import find_config, verb_of
from mmvit.config.finetune import FinetuneConfig
from mmvit.config.pretrain import PretrainConfig
from mmvit.config.validate import key_holds, refuse, validate
from mmvit.config.written import keep_text, read_written, written_override
from mmvit.keys import Problem
from mmvit.towers.config import TowerConfig, ViTConfig

Config = TypeVar("Config")

CONFIG = "config.yaml"
OPEN_KEYS = ("data.train", "zero_shot.class_names", "train.init")  # what a printed recipe may leave to the user
VERBS: dict[type, str] = {PretrainConfig: "pretrain", FinetuneConfig: "finetune"}
START = "start"  # in the folder of a run: the model that it starts from, where it was imported for it
RUN_FILES = ("log.jsonl", "checkpoints", "model")  # what else lies in the folder of a run

logger = logging.getLogger(__name__)


def load_config(
    cls: type[Config],
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    complete: bool = True,
    open_keys: Sequence[str] = (),
) -> Config:
    """Read a YAML file (a path, or a name under configs/), apply `key=value` overrides, validate all keys.

    Args:
        cls: the class of the config.
        source: the YAML file; the one in the folder of a run means that folder.
        overrides: they override the file; if a key is given several times, the last one wins.
        complete: apply the rules between keys too; False for a recipe with open keys that the caller fills in later,
            among them the folder.
        open_keys: keys that need not be set, unless another key of the command line asks for them.

    Raises:
        UsageError: with all problems of the config at once.
    """
    tree = read_tree(source, overrides, cls)
    if complete:
        tree = in_run_folder(tree, source, overrides)
    return from_tree(cls, tree, str(find_config(source)), overrides, complete=complete, open_keys=open_keys)


def in_run_folder(tree: Any, source: str | Path, overrides: Sequence[str]) -> Any:
    """Return the values of a config; one that lies in the folder of a run means that folder, wherever it is now.

    An `out=` argument overrides it.
    """
    path = find_config(source).absolute()
    named = any(override.partition("=")[0] == "out" for override in overrides)
    if not isinstance(tree, dict) or path.name != CONFIG or named:
        return tree
    folder, before = path.parent, str(tree.get("out", ""))
    if not any((folder / name).exists() for name in RUN_FILES):
        return tree
    if Path(before).expanduser().resolve() != folder.resolve():
        logger.info("the config lies in the folder of its run: out=%s, where it says %s", folder, before)
    return tree | {"out": str(folder)}


def read_tree(source: str | Path, overrides: Sequence[str] = (), cls: type | None = None) -> Any:
    """Read a YAML file and apply overrides, as plain dicts and lists: keys and types are not validated yet.

    `${...}` is replaced by the value of another key; `cls` is the class of the config, whose defaults it may use too.
    """
    path = find_config(source, VERBS.get(cls) if cls else None)
    try:
        tree = OmegaConf.load(path)
        written = OmegaConf.create(read_written(path.read_text("utf-8")) or {})
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config cannot be read: {error}", where=str(path)) from error
    _check_verb(cls, source, path, tree if OmegaConf.is_dict(tree) else ())
    counts = Counter(override.partition("=")[0] for override in overrides)
    for key in (key for key, count in counts.items() if count > 1):  # as a shell expands unquoted braces
        logger.warning("%s is given %d times; the last one wins", key, counts[key])
    problems = list(_override_problems(overrides))
    kinds = tower_kinds(cls() if cls else None)
    for override in (override for override in overrides if override.partition("=")[0] in kinds):
        _drop_other_tower(written, override)
        if dropped := _drop_other_tower(tree, override):
            logger.info("%s: its own values replace those of the config for %s", override, ", ".join(dropped))
    for override in filter(_is_setting, overrides):
        try:
            tree = _override(tree, override)
            written = _override(written, written_override(override))
        except UsageError as error:
            problems.append(Problem(error.where or override, error.what, error.hint))
    refuse(problems, "the command line")
    values = _resolved(tree, cls, str(path))
    return values if cls is None else keep_text(cls(), values, _resolved(written, cls, str(path)))


def tower_kinds(config: Any, prefix: str = "") -> list[str]:
    """Return the keys of a config that choose the kind of a tower."""
    if isinstance(config, TowerConfig):
        return [f"{prefix}kind"]
    nested = [entry.name for entry in fields(config) if is_dataclass(entry.type)] if config is not None else []
    return [key for name in nested for key in tower_kinds(getattr(config, name), f"{prefix}{name}.")]


def _drop_other_tower(tree: Any, override: str) -> list[str]:
    """Remove the values of a tower whose kind is replaced, which describe another architecture; return their keys."""
    key, _, kind = override.partition("=")
    group = key.rpartition(".")[0]
    before = OmegaConf.select(tree, group)
    if not isinstance(before, DictConfig) or before.get("kind", ViTConfig.kind) == kind:
        return []
    OmegaConf.update(tree, group, {"kind": kind}, merge=False)
    return [str(name) for name in before if name != "kind"]


def _check_verb(cls: type | None, source: str | Path, path: Path, keys: Collection[Any]) -> None:
    """Raise UsageError for a config of the other verb: one of ours by its folder, another one by its keys."""
    if cls not in VERBS:
        return
    names = {each: {entry.name for entry in fields(each)} for each in VERBS}
    like = [VERBS[each] for each in VERBS if set(keys) <= names[each]]
    wanted, found = VERBS[cls], verb_of(path) or (like[0] if len(like) == 1 else None)
    if found and found != wanted:
        what = f"{source} is a config of mmvit {found}, not of mmvit {wanted}"
        raise UsageError(what, hint=f"mmvit {found} {source}")


def _is_setting(override: str) -> bool:
    key, equals, _ = override.partition("=")
    return bool(key and equals)


def _override_problems(overrides: Sequence[str]) -> Iterator[Problem]:
    """Yield the arguments that are not key=value, each with its value behind it, and what they seem to be."""
    for is_setting, found in groupby(overrides, _is_setting):
        if is_setting:
            continue
        first, *rest = found
        name, colon, value = first.partition(":")
        after = [each.lstrip("=") for each in rest if each != "="]
        meant = f"{name}={value}" if colon else f"{first}={after[0]}" if after else "train.batch_size=512"
        yield Problem(first, f"override {first!r} is not key=value", f"write {meant}, without spaces")


def _override(tree: Any, override: str) -> Any:
    key, _, value = override.partition("=")
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([override if value else f"{key}=''"]))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:  # TypeError: [] for a group of keys
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


def from_tree(
    cls: type[Config],
    tree: Any,
    where: str,
    overrides: Sequence[str] = (),
    *,
    complete: bool = True,
    open_keys: Sequence[str] = (),
) -> Config:
    """Build the dataclass `cls` from plain dicts and lists; raise UsageError with all problems at once.

    `where` is the file of the values, `overrides` the arguments that some of them come from.
    """
    config, found = validate(cls, tree, complete=complete)
    given = [override.partition("=")[0] for override in overrides]
    problems = []
    for problem in found:
        keys = {problem.key, *problem.others}
        if not keys & {*open_keys} or keys & {*given}:
            problems.append(problem)
    from_line = [any(key_holds(key, each.key) or key_holds(each.key, key) for key in given) for each in problems]
    places = [*([where] if not all(from_line) else []), *(["the command line"] if any(from_line) else [])]
    refuse(problems, " and ".join(places))
    return config


def to_yaml(config: Any) -> str:
    """Return a config as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
