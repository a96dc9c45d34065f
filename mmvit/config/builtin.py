"""The configs that come with mmvit, and the file that a name or a path means."""

import re
from pathlib import Path
from typing import NamedTuple

from data_tools.core.errors import UsageError, did_you_mean
from data_tools.core.near import near_path, plain
from mmvit.data.prompts import configs_folder

_LIST = "mmvit configs lists the built-in ones"
_FACT = re.compile(r"^# (Command|Hardware|Time): +(.+)$", re.MULTILINE)


class BuiltinConfig(NamedTuple):
    """A config that comes with mmvit, as the comment at its head describes it; "" for what it does not say."""

    name: str
    about: str
    hardware: str
    time: str
    command: str


def builtin_configs() -> list[BuiltinConfig]:
    """Return the configs that come with mmvit, by name."""
    found = []
    for path in sorted(configs_folder().rglob("*.yaml")):
        text = path.read_text("utf-8")
        facts = dict(_FACT.findall(text))
        first = text.partition("\n")[0].removeprefix("#").strip()
        about, hardware, time = first, facts.get("Hardware", ""), facts.get("Time", "")
        found.append(BuiltinConfig(_name(path), about, hardware, time, facts.get("Command", "")))
    return found


def find_config(source: str | Path, verb: str | None = None) -> Path:
    """Return the file itself, or the one of that name under configs/; raise UsageError with the closest name.

    `verb` is what the config is for: its configs are named first.
    """
    path = Path(source)
    builtin = configs_folder() / f"{str(source).removesuffix('.yaml')}.yaml"
    for candidate in (path, builtin):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        hint = f"pass {path / 'config.yaml'}" if (path / "config.yaml").is_file() else f"pass a YAML file; {_LIST}"
        raise UsageError(f"config {str(source)!r} is a folder", hint=hint)
    raise UsageError(f"config {str(source)!r} was not found", hint=_near(str(source), verb or ""))


def verb_of(path: Path) -> str | None:
    """Return the verb that a config of ours is for, by its folder; None for a file of somebody else.

    Both verbs take `finetune/clip`, which trains both towers.
    """
    inside = path.resolve().is_relative_to(configs_folder().resolve()) and path.stem != "clip"
    return ("finetune" if path.parent.name == "finetune" else "pretrain") if inside else None


def _near(source: str, verb: str) -> str:
    names = [_name(path) for path in configs_folder().rglob("*.yaml")]
    word = plain(source.removesuffix(".yaml"))
    held = [name for name in names if word and word in plain(name)]
    if held:
        best = sorted(held, key=lambda name: (not name.startswith(verb), len(name)))[:3]
        return f"did you mean {' or '.join(map(repr, best))}?"
    in_folder = near_path(source) if Path(source).parent.is_dir() or "/" in source else ""
    if in_folder.startswith("did"):
        return in_folder
    return did_you_mean(source, names) or "; ".join(filter(None, [in_folder, _LIST]))


def _name(path: Path) -> str:
    return path.relative_to(configs_folder()).with_suffix("").as_posix()
