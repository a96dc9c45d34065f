"""Verbs that examine shards: check, repair, stats, peek."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli.options import AsJson, Engine, Shards, Workers


def check(
    shards: Shards,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every image, or read only its header.")
    ] = True,
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Read every byte of the shards and list the damage; the exit code is 3 if there is any, otherwise 0."""
    from data_tools.examine.check import check_shards, describe
    from data_tools.tar.expand import expand_shards

    report = check_shards(expand_shards(shards), decode=decode, num_workers=workers, engine=engine)
    print(json.dumps(report.to_json(), indent=1) if as_json else describe(report, shards))
    if report.is_damaged:
        raise typer.Exit(3)


def repair(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder to create for the new shards; the input shards are not changed.")],
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Write new shards with every intact sample; rejected.jsonl lists the others with the reason."""
    from data_tools.examine.repair import describe, repair_shards
    from data_tools.tar.expand import expand_shards

    report = repair_shards(expand_shards(shards), out, num_workers=workers, engine=engine)
    print(json.dumps(report.to_json(), indent=1) if as_json else describe(report))


def stats(
    shards: Shards,
    picture: Annotated[Path | None, typer.Option(help="PNG to write with plots of the distributions.")] = None,
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Count images, captions, languages, labels and duplicates; a metadata table is stored next to each shard."""
    from data_tools.core.files import check_output_file
    from data_tools.examine.stats import describe, shard_stats
    from data_tools.examine.stats_picture import draw_stats
    from data_tools.tar.expand import expand_shards, spec_text

    if picture is not None:
        check_output_file(picture, ".png")
    numbers, table = shard_stats(expand_shards(shards), num_workers=workers, engine=engine)
    if picture is not None:
        draw_stats(picture, numbers, table, title=spec_text(shards))
    print(json.dumps(numbers, indent=1) if as_json else describe(numbers))


def peek(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    num: Annotated[int, typer.Option("-n", min=1, max=1000, help="Number of samples.")] = 24,
    seed: Annotated[int, typer.Option(help="Another seed selects other samples.")] = 0,
    key: Annotated[list[str] | None, typer.Option(help="Key of a sample to show; can be repeated.")] = None,
    font: Annotated[Path | None, typer.Option(help="Font file; default: a suitable one on this machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a contact sheet of images with their captions; print keys and captions."""
    from data_tools.core.files import check_output_file
    from data_tools.examine.peek import draw_sheet, peek_samples
    from data_tools.tar.expand import expand_shards, spec_text

    check_output_file(out, ".png")
    samples, everyone = peek_samples(expand_shards(shards), num, seed, key or ())
    lacking = draw_sheet(out, samples, f"{spec_text(shards)}: {len(samples):,} of {everyone:,} samples", font)
    if as_json:
        print(json.dumps({"sheet": str(out), "samples": [sample.to_json() for sample in samples]}, indent=1))
        return
    for sample in samples:
        print(f"{sample.shard}/{sample.key}\t{sample.line}")
    if lacking:
        print(
            f"no font on this machine can display: {' '.join(sorted(lacking))}; choose one with --font", file=sys.stderr
        )
