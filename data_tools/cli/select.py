"""Verbs that write samples of shards as new shards: reshard, filter, dedup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli.options import NEW_FOLDER, AsJson, Engine, Shards, ShardSize, Shuffle, Workers
from data_tools.core.errors import UsageError


def reshard(
    shards: Shards,
    out: Annotated[Path, typer.Option(help=NEW_FOLDER)],
    shard_size: ShardSize = 1000,
    shuffle: Shuffle = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of keys to select: one KEY or SHARD.tar/KEY per line, or .npy.")
    ] = None,
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Merge, split, shuffle or select samples into new shards; their bytes are copied unchanged and verified."""
    from data_tools.select import reshard as module
    from data_tools.select.write import OutputOptions
    from data_tools.tar.expand import expand_shards

    output = OutputOptions(out, shard_size, shuffle, workers, engine)
    report, unknown = module.reshard(expand_shards(shards), output, keys)
    if as_json:
        print(json.dumps({**report._asdict(), "unknown_keys": unknown}, indent=1))
        return
    print(report.describe())
    if unknown:
        named = ", ".join(unknown[:5])
        print(f"  {len(unknown)} keys of the list match no sample, see {out / module.UNKNOWN}: {named}")


def filter_(
    shards: Shards,
    where: Annotated[str, typer.Option(help="Condition that samples must satisfy.")],
    out: Annotated[Path | None, typer.Option(help=NEW_FOLDER)] = None,
    scores: Annotated[Path | None, typer.Option(help="Parquet file with the column key and further columns.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count; write nothing.")] = False,
    shard_size: ShardSize = 1000,
    shuffle: Shuffle = None,
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Write the samples that satisfy a condition as new shards; OUT/dropped.txt lists the others.

    Example: --where "width >= 256 and aspect < 3 and language in ('en', 'ko') and not 'logo' in lower(caption)".
    Supported are comparisons, in, is None, and, or, not, + - * /, lower, contains, startswith, endswith and matches (a
    regular expression). Columns: key width height aspect image_format image_bytes caption caption_chars caption_words
    script language label label_name image_sha256 bad, and those of --scores. Comparisons with missing values are false.
    """
    from data_tools.select.filter import filter_samples
    from data_tools.select.write import OutputOptions
    from data_tools.tar.expand import expand_shards

    if out is None and not dry_run:
        raise UsageError("filter needs --out", hint="--out DIR, or --dry-run to count only")
    output = None if dry_run or out is None else OutputOptions(out, shard_size, shuffle, workers, engine)
    tars = expand_shards(shards)
    report = filter_samples(tars, where, scores=scores, output=output, num_workers=workers, engine=engine)
    print(json.dumps(report.to_json(), indent=1) if as_json else report.describe())


def dedup(
    shards: Shards,
    out: Annotated[Path | None, typer.Option(help=NEW_FOLDER + " Default: only report.")] = None,
    threshold: Annotated[
        int, typer.Option(help="Maximum number of differing hash bits of near-duplicates, 0 to 12.")
    ] = 4,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Find identical files only.")] = False,
    report: Annotated[Path | None, typer.Option(help="JSONL file to write, with one line per group.")] = None,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Find duplicate images, and with --out write the shards without them.

    The largest of near-duplicate images and the first of identical ones is kept, with the captions of all of them.
    """
    from data_tools.core.files import check_output_file
    from data_tools.select.dedup import dedup_shards, describe
    from data_tools.select.write import OutputOptions
    from data_tools.tar.expand import expand_shards

    if report is not None:
        check_output_file(report)
    found = dedup_shards(
        expand_shards(shards),
        threshold=None if exact_only else threshold,
        output=None if out is None else OutputOptions(out, shard_size, None, workers, engine),
        report=report,
        num_workers=workers,
        engine=engine,
    )
    print(json.dumps(found.to_json(), indent=1) if as_json else describe(found))
