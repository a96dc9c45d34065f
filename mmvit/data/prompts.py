"""Prompt templates and class names: the text files that turn a list of names into prompts."""

import re
from pathlib import Path

from data_tools.core.errors import MmvitError, UsageError, did_you_mean
from data_tools.core.near import near_path
from data_tools.core.text import check_text

PLACEHOLDER = re.compile(r"\{c?\}")


def configs_folder() -> Path:
    """Return the folder of the configs that come with mmvit, in an installed wheel or in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise MmvitError(
        "the configs that come with mmvit are missing",
        where=f"{package / 'configs'} and {package.parent / 'configs'}",
        hint="reinstall mmvit: pip install --force-reinstall --no-deps mmvit",
    )


def builtin_prompts() -> dict[str, Path]:
    """Return the template sets that come with mmvit: name -> file."""
    files = (configs_folder() / "prompts").glob("*.txt")
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def load_templates(name_or_path: str) -> list[str]:
    """Return the prompt templates of a built-in set or of a file.

    A file has one template per line with `{}` or `{c}` in it exactly once; lines that start with `#` and blank lines
    are skipped. A built-in name wins over a file of the same name; write `./name` for the file.

    Raises:
        UsageError: no such set or file, a line without exactly one placeholder, a double line, an empty file.
    """
    builtin = builtin_prompts()
    path = builtin.get(name_or_path) or Path(name_or_path)
    if not _is_file(path):
        hint = did_you_mean(name_or_path, builtin)
        raise UsageError(
            f"no templates named '{name_or_path}'" + (f": {hint}" if hint else ""),
            hint=f"use one of {', '.join(builtin)}, or the path of a file with one template per line",
        )
    templates: dict[str, int] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        check_template(line, where=f"{path}, line {number}")
        if line in templates:
            raise UsageError(
                f"the template '{line}' is duplicated, so it would count twice in the mean",
                where=f"{path}, lines {templates[line]} and {number}",
                hint=f"remove line {number}",
            )
        templates[line] = number
    if not templates:
        raise UsageError("the file has no template", where=str(path), hint="write at least one line, such as: {}")
    return list(templates)


def fill(template: str, name: str) -> str:
    """Return the template with the class name in the place of `{}` or `{c}`."""
    return PLACEHOLDER.sub(lambda _: name, template, count=1)


def load_class_names(spec: str) -> list[str]:
    """Return the class names of a file (one per line) or of a text such as "dog,cat,red apple".

    The order is kept: it is the order of the classifier's outputs.

    Raises:
        UsageError: no such file, nothing in it, a blank line or entry before the last name, or a double name.
    """
    path = Path(spec)
    if _is_file(path):
        names, unit, where = _read_lines(path), "line", str(path)
        while names and not names[-1]:
            names.pop()
    elif "," in spec:
        names, unit, where = [name.strip() for name in spec.split(",")], "entry", "the list of names"
    else:
        near = near_path(spec) if path.suffix or "/" in spec else ""
        forms = 'pass a file with one name per line, or at least two names separated by commas: "dog,cat,red apple"'
        raise UsageError(f"no file of class names '{spec}'", hint=near or forms)
    _check_class_names(names, unit, where)
    return names


def _check_class_names(names: list[str], unit: str, where: str) -> None:
    for name in names:
        check_text(name, "class name", where)
    if not names:
        raise UsageError("no class name was given", where=where, hint="write one name per line")
    blank = [str(number) for number, name in enumerate(names, start=1) if not name]
    if blank:
        raise UsageError(
            f"blank {unit} among the class names",
            where=f"{where}, {unit} {', '.join(blank)}",
            note="a missing name would shift the numbers of all following classes",
            hint=f"write the missing name there or remove the blank {unit}",
        )
    first: dict[str, int] = {}
    double = []
    for number, name in enumerate(names, start=1):
        if name in first:
            double.append(f"'{name}' at {unit} {first[name]} and {number}")
        first.setdefault(name, number)
    if double:
        raise UsageError(
            "duplicate class names",
            where=f"{where}: {'; '.join(double)}",
            note="equal names cannot be distinguished",
            hint="remove one, or make them distinct: 'crane (bird)' and 'crane (machine)'",
        )


def check_template(line: str, where: str) -> None:
    """Raise UsageError if the line does not have exactly one placeholder; `where` is its location."""
    found = len(PLACEHOLDER.findall(line))
    if found == 1 and not re.search(r"[{}]", PLACEHOLDER.sub("", line)):
        return
    what = "a brace that is not a placeholder" if found == 1 else f"{found} placeholders"
    raise UsageError(
        f"the template '{line}' has {what}",
        where=where,
        hint="write {} exactly once, where the class name goes: a photo of a {}.",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a long list of names is no path: the name is too long, or holds a null byte
        return False


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            "the file is not UTF-8 text",
            where=f"{path}, byte {error.start}",
            hint=f"save it as UTF-8: iconv -f ENCODING -t UTF-8 {path} > {path.stem}-utf8.txt",
        ) from error
    return [line.strip() for line in text.split("\n")]
