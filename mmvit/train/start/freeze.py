"""Freezing of parameters."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from data_tools.core.errors import UsageError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of the patterns, such as `image_tower.*`.

    Raises:
        UsageError: a pattern matches no parameter, or all parameters are frozen.
    """
    parameters = dict(model.named_parameters())
    for name in fitting(parameters, patterns, where="train.freeze"):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        what = f"nothing is left to train: {', '.join(patterns)} match every parameter"
        raise UsageError(what, where="train.freeze", hint="remove a pattern")


def fitting(names: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    """Return the names that match one of the patterns; raise UsageError for a pattern without a match."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, [*_prefixes(names), *names], n=3, cutoff=0.5)
            those = ", ".join(near or sorted({name.partition(".")[0] for name in names}))
            what = f"no parameter matches {pattern!r}"
            raise UsageError(what, where=where, hint=f"similar names: {those}; * matches any text")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _prefixes(names: Sequence[str]) -> list[str]:
    """Return the patterns for whole modules: `image_tower.*`, `image_tower.blocks.*`."""
    parts = [name.split(".") for name in names]
    return sorted({".".join([*part[:depth], "*"]) for part in parts for depth in range(1, len(part))})
