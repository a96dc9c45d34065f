"""Tools for shards of image-text pairs: make, index, check and select; without torch.

The names in `__all__` are the public interface; each is loaded on first use:

- `Location`: a file on disk or at a URL, printed without its secrets; `expand_shards`: locations matching a pattern.
- `ShardWriter`, `ShardReader`, `ShardIndex`, `open_index`, `open_indexes`: write shards, and read samples by number.
- `make_shards` with `MakeOptions`, `check_shards`, `repair_shards`: what the verbs of `mmvit-data` do.
- `MmvitError` and its kinds: errors that a user can fix, each with an exit code.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "CheckpointError": "core.errors",
    "DataError": "core.errors",
    "Location": "tar.location",
    "MakeOptions": "make.options",
    "MmvitError": "core.errors",
    "ResourceError": "core.errors",
    "SampleError": "core.errors",
    "ShardIndex": "tar.index",
    "ShardReader": "tar.reader",
    "ShardWriter": "tar.writer",
    "UsageError": "core.errors",
    "check_shards": "examine.check",
    "expand_shards": "tar.expand",
    "make_shards": "make.run",
    "open_index": "tar.index",
    "open_indexes": "tar.index",
    "repair_shards": "examine.repair",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
