"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

NEW_FOLDER = "Folder to create for the new shards; a killed run resumes."

Shards = Annotated[list[str], typer.Argument(help="Tars, folders, ranges {000..012} or globs.")]
DataSetFolder = Annotated[
    Path, typer.Argument(help="Folder to create; a finished data set of the same options is kept.")
]
ShardSize = Annotated[int, typer.Option(min=1, help="Samples per shard.")]
Shuffle = Annotated[int | None, typer.Option(min=0, help="Seed of a random order over all shards.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one per core.")]
Engine = Annotated[str, typer.Option(help="local, or ray for a cluster (the extra ray).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def seed_option(what: str) -> Any:
    """Return the option of a seed, with `what` it changes as its help."""
    return typer.Option(min=0, max=2**32 - 1, help=what)


def split_commas(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list, without blank ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
