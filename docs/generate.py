"""Write the reference pages from the code: `python docs/generate.py`.

docs/reference/config.md lists every config key as its dataclass field declares it, docs/reference/verbs.md every option
of both programs.
"""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # to be started from anywhere

from data_tools.cli.app import app as data_app  # noqa: E402
from mmvit.cli import app as mmvit_app  # noqa: E402
from mmvit.config import FinetuneConfig, PretrainConfig, RunConfig  # noqa: E402
from mmvit.keys import Key, key_of  # noqa: E402
from mmvit.models.image_towers import TOWERS  # noqa: E402
from mmvit.towers.contract import TowerConfig  # noqa: E402
from mmvit.towers.timm_tower import TimmConfig  # noqa: E402

COMMAND = "python docs/generate.py"
NOTE = f"<!-- Written by `{COMMAND}`: change the code and run it again. -->"
TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


def pages() -> dict[str, str]:
    """Return the text of each page by its path below docs/."""
    return {"reference/config.md": config_page(), "reference/verbs.md": verbs_page()}


def stale(folder: Path = FOLDER) -> str:
    """Return which pages in a folder are not what the code says, and the command that updates them; "" if none."""
    old = [name for name, text in pages().items() if _text(folder / name) != text]
    return f"{', '.join(old)} is stale; run: {COMMAND}" if old else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def config_page() -> str:
    """Return the page of the config keys."""
    towers = {type(tower): [name for name in TOWERS if type(TOWERS[name]) is type(tower)] for tower in TOWERS.values()}
    both = {entry.name for entry in dataclasses.fields(RunConfig)}
    lines = [
        "# Config keys",
        NOTE,
        "A config is a YAML file, or a name under `configs/`. `key=value` arguments override the file; if a key is "
        "given more than once, the last one wins. All keys are validated before anything starts, and all errors are "
        "reported at once. `mmvit pretrain CONFIG --print-config` prints every key and its value.",
        "The column *resume* shows whether a value may change when a run resumes:\n\n"
        "- *same*: it must not change; resuming with another value is refused.\n"
        "- *logged*: it may change, and the change is logged.\n"
        "- *free*: it may change; the weights do not depend on it, or only up to rounding. A path may change, its "
        "content must be the same.",
        *section("Keys of both programs", RunConfig, "", both),
        *section("Keys of `mmvit pretrain`", PretrainConfig, "", {"out"} | _own(PretrainConfig)),
        *section("Keys of `mmvit finetune`", FinetuneConfig, "", {"out"} | _own(FinetuneConfig)),
        "## Image towers",
        "The keys below `model.image` depend on `model.image.kind`. The name also sets their defaults; the tables show "
        "those of the first name.",
    ]
    for kind, names in towers.items():
        lines += [
            "### " + ", ".join(f"`{name}`" for name in names),
            _doc(kind),
            table(TOWERS[names[0]], "model.image."),
        ]
    lines += ["### `timm:NAME`", _doc(TimmConfig), table(TimmConfig(), "model.image.")]
    return "\n\n".join(lines) + "\n"


def _own(cls: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(cls)} - {entry.name for entry in dataclasses.fields(RunConfig)}


def section(title: str, cls: type, prefix: str, names: set[str]) -> Iterator[str]:
    """Yield the heading and the tables of the named keys of a config, and of all in them."""
    config = cls()
    rows = [entry.name for entry in dataclasses.fields(cls) if entry.name in names and key_of(entry)]
    if cls is RunConfig:
        rows.remove("out")  # which has a default of each program
    yield f"## {title}"
    if rows:
        yield table(config, prefix, rows)
    yield from sections(config, prefix, names)


def sections(config: Any, prefix: str, names: set[str] | None = None) -> Iterator[str]:
    """Yield heading and table of each config in a config, image towers aside."""
    for entry in dataclasses.fields(config):
        if names is not None and entry.name not in names:
            continue
        inner = entry.type if is_dataclass(entry.type) else next(filter(is_dataclass, get_args(entry.type)), None)
        if inner is None or inner is TowerConfig:
            continue
        name = prefix + entry.name + ("" if is_dataclass(entry.type) else "[]")
        value = getattr(config, entry.name) if is_dataclass(entry.type) else inner()
        yield f"### `{name}`"
        yield _doc(inner)
        if any(key_of(each) for each in dataclasses.fields(inner)):
            yield table(value, f"{name}.")
        yield from sections(value, f"{name}.")


def table(config: Any, prefix: str, names: list[str] | None = None) -> str:
    """Return the table of the keys that a config declares itself."""
    rows = ["| key | value | default | meaning | resume |", "|---|---|---|---|---|"]
    for entry in dataclasses.fields(config):
        declared = key_of(entry)
        if declared and (names is None or entry.name in names):
            kind, default = kind_text(entry.type, declared), _default(getattr(config, entry.name))
            rows.append(row(f"`{prefix}{entry.name}`", kind, default, declared.help, declared.resume))
    return "\n".join(rows)


def row(*cells: str) -> str:
    """Return a row of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def kind_text(kind: Any, declared: Key) -> str:
    """Return type, choices and bounds of a key as text."""
    parts = [part for part in (get_args(kind) if NoneType in get_args(kind) else (kind,)) if part is not NoneType]
    texts = []
    for part in parts:
        (item, *_) = get_args(part) if get_origin(part) is list else (part,)
        if get_origin(item) is Literal:
            text = ", ".join(f"`{choice}`" for choice in get_args(item))
        elif get_origin(item) is dict:
            text = "mapping of text to number"
        else:
            text = "mapping" if is_dataclass(item) else TYPES[item]
        text += f" {declared.bounds}" if declared.bounds else ""
        if get_origin(part) is list:
            text = "list of " + ("items of " if text.startswith("`") else "") + text
            text += f" ({declared.length} items)" if declared.length else ""
        texts.append(text)
    return " or ".join([*texts, *(["null"] if len(parts) < len(get_args(kind)) and NoneType in get_args(kind) else [])])


def _default(value: Any) -> str:
    if isinstance(value, list):
        return f"`[{', '.join(_default(each).strip('`') for each in value)}]`"
    if is_dataclass(value):
        return "{}"
    words = {None: "null", True: "true", False: "false"}
    plain = words[value] if value is None or isinstance(value, bool) else value
    if isinstance(plain, float):
        plain = f"{plain:.6g}"
    return f"`{plain}`" if plain != "" else '`""`'


def _doc(cls: type) -> str:
    return (inspect.getdoc(cls) or "").replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n")


def verbs_page() -> str:
    """Return the page of the verbs of both programs."""
    lines = ["# Commands", NOTE]
    for name, app in (("mmvit", mmvit_app), ("mmvit-data", data_app)):
        lines += [f"## {name}", *program_lines(name, app)]
    return "\n\n".join(lines) + "\n"


def program_lines(program: str, app: typer.Typer) -> Iterator[str]:
    """Yield the help of a program, and heading, usage, help and table of each verb."""
    yield inspect.cleandoc(app.info.help or "")
    for command in app.registered_commands:
        verb = command.callback
        assert verb is not None
        name = command.name or verb.__name__.replace("_", "-")
        hints = get_type_hints(verb, include_extras=True)
        rows = [parameter_cells(hints[each.name], each) for each in inspect.signature(verb).parameters.values()]
        places = "".join(f" {cells[0].strip('`')}" for cells in rows if not cells[0].startswith("`-"))
        yield f"### {program} {name}"
        yield f"```\n{program} {name}{places} [OPTIONS]\n```"
        yield inspect.cleandoc(verb.__doc__ or "")
        if rows:
            lines = ["| argument or option | value | default | meaning |", "|---|---|---|---|"]
            yield "\n".join([*lines, *(row(*cells) for cells in rows)])


def parameter_cells(hint: Any, parameter: inspect.Parameter) -> tuple[str, str, str, str]:
    """Return name, value, default and meaning of an argument or option."""
    kind, info = get_args(hint)
    if isinstance(info, typer.models.ArgumentInfo):
        names = [info.metavar or parameter.name.upper()]
    else:
        given = [info.default] if isinstance(info.default, str) else []  # where typer has the first name
        names = [*given, *(info.param_decls or [])] or [f"--{parameter.name.replace('_', '-')}"]
    kinds = [part for part in get_args(kind) or (kind,) if part not in (NoneType, list)]
    several = get_origin(kind) is list or any(get_origin(part) is list for part in kinds)
    (item,) = get_args(kinds[0]) or (kinds[0],)
    limits = Key("", ge=info.min, le=info.max).bounds
    value = "" if item is bool else f"{TYPES.get(item, 'path')} {limits}".strip() + (", repeatable" if several else "")
    default = parameter.default
    shown = "" if default is None or default is False else f"`{default}`" if default != "" else '`""`'
    if default is inspect.Parameter.empty:
        shown = "required"
    return ", ".join(f"`{name}`" for name in names), value, shown, info.help or ""


if __name__ == "__main__":
    main()
