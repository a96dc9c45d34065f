"""Config keys, each declared once: at its dataclass field, with its bounds, help and effect on resume."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

Number = int | float
# The effect of a changed value on a run that resumes.
# free: it may change; no weight depends on it, or only the rounding.
# logged: it may change, and the change is logged; the results of the run change from then on.
# same: it must not change; another value is another experiment, or does not fit the saved state.
Resume = Literal["free", "logged", "same"]
_METADATA = "key"


class Problem(NamedTuple):
    """One thing that is wrong with a config.

    Args:
        key: the config key to change, below the config that reports it.
        what: what is wrong, one sentence; where it names the key, it starts with it.
        hint: how to fix it.
        others: further keys that the sentence depends on.
    """

    key: str
    what: str
    hint: str | None = None
    others: tuple[str, ...] = ()

    def below(self, prefix: str) -> "Problem":
        """Return the problem as the config that holds this one at `prefix` names it."""
        what = prefix + self.what if self.what.startswith(self.key) else self.what
        return Problem(prefix + self.key, what, self.hint, tuple(prefix + other for other in self.others))


@dataclass(frozen=True)
class Key:
    """The declaration of a field in addition to its type and default; bounds apply to each item of a list."""

    help: str
    resume: Resume = "same"
    ge: Number | None = None
    gt: Number | None = None
    le: Number | None = None
    lt: Number | None = None
    min_length: int | None = None
    max_length: int | None = None
    ascending: bool = False  # no item of a list is below the one before it
    path: bool = False  # a leading ~ is the user's home folder

    @property
    def bounds(self) -> str:
        """Return the bounds of a number as text, "" if there are none."""
        if self.ge is not None and self.le is not None:
            return f"from {self.ge} to {self.le}"
        limits = (("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt))
        return " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)

    @property
    def length(self) -> str:
        """Return the allowed number of items of a list as text, "" if there is no limit."""
        if self.min_length is not None and self.min_length == self.max_length:
            return f"exactly {self.min_length}"
        limits = (("at least", self.min_length), ("at most", self.max_length))
        return " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)

    def problems(self, name: str, value: Any) -> Iterator[Problem]:
        """Yield what is wrong with a value of the right type."""
        if isinstance(value, list):
            if not (self.min_length or 0) <= len(value) <= (self.max_length or math.inf):
                yield Problem(name, f"{name} has {len(value)} items; it must have {self.length}")
            found = [problem for i, item in enumerate(value) for problem in self.problems(f"{name}[{i}]", item)]
            yield from found
            if self.ascending and not found and sorted(value) != value:
                yield Problem(name, f"{name} is {value}; it must go from the lower to the higher value")
        elif isinstance(value, dict):
            for item_name, item in value.items():
                yield from self.problems(f"{name}.{item_name}", item)
        elif isinstance(value, int | float) and self.bounds and not self._holds(value):
            yield Problem(name, f"{name} is {value}; it must be {self.bounds}")

    def _holds(self, value: Number) -> bool:
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def key(default: Any, help: str, resume: Resume = "same", *, path: bool = False, **bounds: Number) -> Any:
    """Declare a config key as the default of its dataclass field.

    Args:
        default: the default; each config gets its own list or dict.
        help: what the key means, one line, with its unit.
        resume: the effect of a changed value on a run that resumes.
        path: the value is a file or folder, or several of them.
        bounds: of `Key`: `ge`, `gt`, `le`, `lt` for numbers, `min_length`, `max_length` and `ascending` for lists.
    """
    metadata = {_METADATA: Key(help, resume, path=path, **bounds)}  # type: ignore[arg-type]  # lengths are whole numbers
    if isinstance(default, list | dict):
        return field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def key_of(entry: "dataclasses.Field[Any]") -> Key | None:
    """Return what a field declares; None for a field that holds further keys."""
    found: Key | None = entry.metadata.get(_METADATA)
    return found


def declared(config: Any, prefix: str = "") -> dict[str, Key]:
    """Return the keys of a config by their dotted names; a list is one key."""
    keys: dict[str, Key] = {}
    for entry in dataclasses.fields(config):
        name, value, found = prefix + entry.name, getattr(config, entry.name), key_of(entry)
        if found:
            keys[name] = found
        elif is_dataclass(value):
            keys |= declared(value, f"{name}.")
    return keys


def bound_problems(config: Any) -> Iterator[Problem]:
    """Yield the values of a config that are out of bounds; their types are taken as right."""
    for entry in dataclasses.fields(config):
        found = key_of(entry)
        if found:
            yield from found.problems(entry.name, getattr(config, entry.name))
