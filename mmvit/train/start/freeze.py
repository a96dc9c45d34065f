"""Which parameters a run does not train."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from data_tools.core.errors import UsageError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Keep the parameters whose names fit one of the patterns, such as `image_tower.*`, from being trained.

    Raises:
        UsageError: a pattern that fits no parameter, or patterns that leave nothing to train.
    """
    parameters = dict(model.named_parameters())
    for name in fitting(parameters, patterns, where="train.freeze"):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        what = f"nothing is left to train: {', '.join(patterns)} fit every parameter"
        raise UsageError(what, where="train.freeze", hint="leave a part out of it")


def fitting(names: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    """Return the names that fit one of the patterns; raises UsageError for a pattern that fits none."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, [*_prefixes(names), *names], n=3, cutoff=0.5)
            those = ", ".join(near or sorted({name.partition(".")[0] for name in names}))
            what = f"no parameter is named {pattern!r}"
            raise UsageError(what, where=where, hint=f"names near it: {those}; * stands for anything")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _prefixes(names: Sequence[str]) -> list[str]:
    """Return the patterns for whole modules: `image_tower.*`, `image_tower.blocks.*`."""
    parts = [name.split(".") for name in names]
    return sorted({".".join([*part[:depth], "*"]) for part in parts for depth in range(1, len(part))})
