"""Numbers of classes: labels that are numbers keep their number, also where they are written as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from data_tools.core.errors import UsageError
from data_tools.sample.content import Label

MAX_CLASSES = 1_000_000

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}(\.0*)?")  # pandas writes 3.0 for 3 where a number is missing
_SHOWN = 5


def as_integer(label: object) -> int | None:
    """Return the integer that a label is: 7, 7.0, "7", "007" or "7.0"; None for anything else."""
    if isinstance(label, bool):
        return None
    if isinstance(label, int):
        return label
    if isinstance(label, float):
        return int(label) if label.is_integer() else None
    text = str(label).strip()
    return int(text.partition(".")[0]) if _INTEGER.fullmatch(text) else None


def order_classes(names: Collection[str]) -> tuple[str, ...]:
    """Return the class names by class number.

    Names that are all integers keep their number: "10" is class 10, and "007" class 7. Numbers in between get their
    digits as a name. Other names are numbered in the order of their characters.

    Raises:
        UsageError: the names are integers and one is negative, at least `MAX_CLASSES`, or equal to another one.
    """
    numbers = {name: as_integer(name) for name in sorted(names)}
    by_number: dict[int, str] = {}
    for name, number in numbers.items():
        if number is None:
            return tuple(numbers)
        hint = "rename it, or list the names in a file: --classnames FILE here, classes=FILE in training"
        if not 0 <= number < MAX_CLASSES:
            what = f"the class {name!r} is a number, and class numbers go from 0 to {MAX_CLASSES - 1}"
            raise UsageError(what, hint=hint)
        if number in by_number:
            raise UsageError(f"the classes {by_number[number]!r} and {name!r} are the same number", hint=hint)
        by_number[number] = name
    return tuple(by_number.get(number, str(number)) for number in range(max(by_number, default=-1) + 1))


def class_numbers(classes: Sequence[str]) -> dict[Label, int]:
    """Return the number of each class by its name and by its number."""
    numbers: dict[Label, int] = {number: number for number in range(len(classes))}
    return numbers | {name: number for number, name in enumerate(classes)}


def find_class(label: Label, numbers: Mapping[Label, int]) -> int | None:
    """Return the class of a label by its name, or else by its number, which may be text; None if there is none."""
    if label in numbers:
        return numbers[label]
    number = as_integer(label)
    return None if number is None else numbers.get(number)


def describe_numbers(classes: Sequence[str], found: Collection[str]) -> list[str]:
    """Return what a user should know of the numbers of classes, of which `found` have samples: up to one line.

    That is: numbers were kept; or names that are numbers stand for others.
    """
    numbers = [as_integer(name) for name in classes]
    other = [f"{name!r} is class {i}" for i, name in enumerate(classes) if numbers[i] not in (None, i)]
    if other:
        return [f"renumbered: {_some(other)}; a name that is a number keeps it only where all names are numbers"]
    if not classes or None in numbers:
        return []
    missing = [name for name in classes if name not in found]
    without = f"; no sample for {len(missing)} of them: {_some(missing)}" if missing else ""
    return [f"class numbers are kept: 0 to {len(classes) - 1}{without}"]


def _some(words: Sequence[str]) -> str:
    more = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
