"""Validation of configs: unknown keys, types, bounds and the rules between keys, all problems at once."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_tools.core.errors import UsageError, did_you_mean
from data_tools.core.secrets import hide_secrets
from data_tools.core.text import text_fault
from mmvit.config.near import near_keys, note
from mmvit.keys import Problem, declared, key_of
from mmvit.models.config import tower_config
from mmvit.towers.config import TowerConfig, ViTConfig

Config = TypeVar("Config")

_FP16 = "fp16 is not supported: auto uses bf16 on hardware that has it, and fp32 elsewhere"
_VALUES = dict.fromkeys(("fp16", "float16", "half", "amp", "16", "16-mixed", "fp16-mixed"), _FP16)  # by other names


def validate(
    cls: type[Config], tree: Any, *, strict: bool = False, complete: bool = True
) -> tuple[Config, list[Problem]]:
    """Return the config that dicts and lists describe, with defaults in place of wrong values, and the problems.

    Args:
        cls: a config whose fields all have defaults.
        tree: the values to set; an image tower gets the defaults of its `kind`.
        strict: refuse values of another type, such as "5" for 5, instead of converting them.
        complete: apply the rules between keys too; some ask for keys that a recipe leaves open.
    """
    fit = _Fit(cls, strict)
    config = fit.config(cls(), tree, "")
    if complete:
        fit.problems += [problem for problem in _rule_problems(config) if not _follows(problem, fit.problems)]
    return config, fit.problems


def refuse(problems: Sequence[Problem], where: str | None = None) -> None:
    """Raise one UsageError for all problems, if there are any; `where` is the file of the values."""
    if not problems:
        return
    if len(problems) == 1:
        (problem,) = problems
        raise UsageError(problem.what, where=", ".join(filter(None, [problem.key, where])), hint=problem.hint)
    lines = []
    for problem in problems:
        what = problem.what if problem.key in problem.what else f"{problem.key}: {problem.what}"
        lines.append("\n    ".join(filter(None, [f"  - {what}", problem.hint and f"  hint: {problem.hint}"])))
    raise UsageError("\n".join([f"the config has {len(problems)} errors", *lines]), where=where)


class _Fit:
    """Sets the values of a config and collects the problems of invalid ones."""

    def __init__(self, cls: type, strict: bool):
        self.cls = cls
        self.strict = strict
        self.problems: list[Problem] = []

    def config(self, base: Any, tree: Any, name: str) -> Any:
        """Set the keys of a config and return it."""
        if not isinstance(tree, dict):
            what = f"{name or 'the config'} is {_shown(tree)}; it must be a mapping of keys to values"
            self.problems.append(Problem(name, what, _main_key(base, name, tree)))
            return base
        prefix = f"{name}." if name else ""
        if isinstance(base, TowerConfig):
            try:
                base = tower_config(str(tree.get("kind", ViTConfig.kind)))
            except ValueError as error:
                what, _, hint = str(error).partition("; ")
                self.problems.append(Problem(f"{prefix}kind", what, hint))
                return base
        entries = {entry.name: entry for entry in dataclasses.fields(base)}
        for key, value in tree.items():
            if key in entries:
                setattr(base, key, self.value(entries[key], getattr(base, key), value, f"{prefix}{key}"))
            else:
                of = f", which {base.kind} does not have" if isinstance(base, TowerConfig) and "kind" in tree else ""
                what = f"unknown config key {prefix}{key}{of}"
                self.problems.append(Problem(f"{prefix}{key}", what, self.key_hint(base, prefix, key, value)))
        return base

    def key_hint(self, base: Any, prefix: str, key: Any, value: Any) -> str:
        """Return the keys that an unknown one may mean, by their whole names, else those next to it."""
        name = f"{prefix}{key}"
        while isinstance(value, dict) and value:  # optimizer.lr=1 is an unknown key with a known one in it
            inner, value = next(iter(value.items()))
            name = f"{name}.{inner}"
        beside = [f"{prefix}{each}" for each in near_keys(base, str(key))] if prefix else []
        keys = beside or near_keys(self.cls, name)
        if keys and not note(name):
            return "did you mean " + " or ".join(f"'{each}'" for each in keys) + "?"
        return note(name) or f"keys here: {', '.join(entry.name for entry in dataclasses.fields(base))}"

    def value(self, entry: "dataclasses.Field[Any]", default: Any, value: Any, name: str) -> Any:
        """Return the value of a field converted to its type, or the default if it is invalid."""
        if is_dataclass(entry.type):
            return self.config(default, value, name)
        if get_origin(entry.type) is list and not self.strict and not isinstance(value, list):
            value = [] if value == "" else [value]  # a single value for a list
        (item_type,) = get_args(entry.type) if get_origin(entry.type) is list else (None,)
        if isinstance(item_type, type) and is_dataclass(item_type) and isinstance(value, list):
            found = [self.config(item_type(), item, f"{name}[{i}]") for i, item in enumerate(value)]
            problems: list[Problem] = []
        else:
            found, problems = _converted(entry.type, value, name, self.strict)
            problems = problems or list(_text_problems(name, found))
        key = key_of(entry)
        if key and not problems:
            problems = list(key.problems(name, found))
        if default not in ("", []) and all(isinstance(each, int | float | str) for each in _items(default)):
            example = f"for example {name}={_written(default)}"
            problems = [each if each.hint else each._replace(hint=example) for each in problems]
        self.problems += problems
        if key and key.path and not problems:
            return [_at_home(each) for each in found] if isinstance(found, list) else _at_home(found)
        return default if problems else found


def _at_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - a Path would shorten the // of a URL


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _main_key(config: Any, name: str, value: Any) -> str | None:
    """Return the key that a value for a whole group is probably for: that of a kind, else the first one."""
    keys = list(declared(config))
    if not name or not keys or isinstance(value, list | dict) or value is None:
        return None
    first = next((key for key in keys if key.rpartition(".")[2] == "kind"), keys[0])
    return f"did you mean {name}.{first}={value}?"


@cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False))


def _converted(kind: Any, value: Any, name: str, strict: bool) -> tuple[Any, list[Problem]]:
    """Return the value converted to the type, and its problems."""
    if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:  # which pydantic takes for 0 or 1
        return value, [Problem(name, f"{name} is {_shown(value)}; it must be a number")]
    try:
        return _adapter(kind).validate_python(value, strict=strict), []
    except ValidationError as error:
        return value, [_type_problem(kind, name, dict(each)) for each in error.errors(include_url=False)]


def _text_problems(name: str, value: Any) -> Iterator[Problem]:
    """Yield the texts of a value that no file and no tokenizer can hold."""
    for text in value if isinstance(value, list | dict) else [value]:
        if isinstance(text, str) and text_fault(text):
            yield Problem(name, f"{name} is {text[:60]!a}; it {text_fault(text)}")


def _type_problem(kind: Any, name: str, error: dict[str, Any]) -> Problem:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    value, hint = error["input"], None
    if error["type"] == "literal_error":
        near = _VALUES.get(str(value).lower()) or did_you_mean(str(value), _choices(kind))
        hint = near or f"choose from {', '.join(_choices(kind))}"
    elif error["type"] == "list_type":
        hint = f"{name}=[...]" + (", or null" if type(None) in get_args(kind) else "")
    what = str(error["msg"]).replace("Input should be", "it must be")
    return Problem(name + place, f"{name}{place} is {_shown(value)}; {what}", hint)


def _choices(kind: Any) -> list[str]:
    """Return the choices of a type, also of one that holds it."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _shown(value: Any) -> str:
    """Return a value as YAML text, truncated if it is long, without the secrets of URLs."""
    return _written(value) if value is None or isinstance(value, bool) else f"{hide_secrets(repr(value)):.60}"


def _written(value: Any) -> str:
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value)


def _rule_problems(config: Any, prefix: str = "") -> Iterator[Problem]:
    """Yield violations of the rules of a config and of nested ones."""
    if hasattr(config, "problems"):
        yield from (problem.below(prefix) for problem in config.problems())
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from _rule_problems(value, f"{prefix}{entry.name}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if is_dataclass(item):
                    yield from _rule_problems(item, f"{prefix}{entry.name}[{i}].")


def _follows(problem: Problem, earlier: Sequence[Problem]) -> bool:
    """Return whether a rule was violated by a value that is invalid by itself."""
    wrong = [each.key for each in earlier]
    names = (problem.key, *problem.others)
    return any(key_holds(name, key) or key_holds(key, name) for name in names for key in wrong)


def key_holds(name: str, key: str) -> bool:
    """Return whether a key is another one, or below it."""
    return key == name or key.startswith((f"{name}.", f"{name}["))
