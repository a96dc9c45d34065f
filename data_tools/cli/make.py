"""Verbs that make shards, their indexes, and a tokenizer of their captions: make, index, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.cli.options import AsJson, Engine, Shards, Workers, split_commas

_KINDS = "folder, classes, csv, tsv, coco, jsonl, parquet, img2dataset or datasets; default: detected."

_ClassNames = Annotated[
    Path | None, typer.Option(help="File of class names that fixes their numbers, such as that of another split.")
]
_ImageRoot = Annotated[
    Path | None, typer.Option(help="Folder of the images: paths are relative to it and must stay inside.")
]
_MaxBad = Annotated[
    float, typer.Option(min=0, max=1, help="Fail (exit code 3) if more than this fraction of rows is rejected.")
]


def make(
    source: Annotated[Path, typer.Argument(help="File or folder of images with texts or classes.")],
    out: Annotated[Path, typer.Argument(help="Folder to create; a killed run resumes in it.")],
    kind: Annotated[str | None, typer.Option(help=_KINDS)] = None,
    image_column: Annotated[str | None, typer.Option(help="Image column of a table; default: detected.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Caption column, or several with commas.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of class numbers or names; '' for none.")] = None,
    delimiter: Annotated[str | None, typer.Option(help="Of CSV: a character, or tab; default: detected.")] = None,
    no_captions: Annotated[bool, typer.Option("--no-captions", help="Write images without captions.")] = False,
    template: Annotated[str | None, typer.Option(help="Make captions of class names: 'a photo of a {}'.")] = None,
    classnames: _ClassNames = None,
    image_root: _ImageRoot = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Resize larger images to this shorter side, px.")] = None,
    image_format: Annotated[str, typer.Option("--format", help="keep, jpg, webp or png.")] = "keep",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of re-encoded images.")] = 95,
    allow_formats: Annotated[str, typer.Option(help="Additional formats to read: gif,bmp,tiff.")] = "",
    shard_size: Annotated[int, typer.Option(min=1, help="Rows per shard.")] = 1000,
    shuffle: Annotated[
        int | None, typer.Option(min=0, help="Seed of the order; default: 0 if there are labels.")
    ] = None,
    in_order: Annotated[bool, typer.Option("--in-order", help="Keep the order of the source.")] = False,
    max_bad: _MaxBad = 0.01,
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Make shards from a folder, table, img2dataset output or Hugging Face data set; nothing is downloaded.

    Each image is decoded once. Rejected rows are listed with the reason in OUT/rejected.jsonl.

    A killed run resumes when run again. Equal sources and options give equal bytes with any number of workers.
    """
    from data_tools.make.options import MakeOptions
    from data_tools.make.run import check_rejected, describe, make_shards

    options = MakeOptions(
        kind=kind,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        delimiter=delimiter,
        captions=not no_captions,
        template=template,
        classnames=classnames,
        image_root=image_root,
        resize=resize,
        image_format=image_format,
        quality=quality,
        allow_formats=split_commas(allow_formats),
        shard_size=shard_size,
        shuffle=shuffle,
        in_order=in_order,
    )
    report = make_shards(source, out, options, num_workers=workers, engine=engine, max_bad=max_bad)
    print(json.dumps(vars(report), indent=1) if as_json else describe(report))
    check_rejected(report, max_bad)


def index(
    shards: Shards,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Rebuild existing indexes too.")] = False,
    workers: Workers = None,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Build the index NAME.tar.idx of each shard that has none or a stale one, and list what the shards contain."""
    from data_tools.tar.expand import expand_shards, spec_text
    from data_tools.tar.index import open_indexes

    rows: list[dict[str, Any]] = [
        {"shard": str(index.tar), "samples": len(index), "fields": index.fields, "ignored": index.ignored}
        | {"problems": index.problem_counts, "bytes": index.tar_size}
        for index in open_indexes(expand_shards(shards), rebuild, num_workers=workers, engine=engine)
    ]
    total = sum(row["samples"] for row in rows)
    if as_json:
        print(json.dumps({"shards": rows, "samples": total}, indent=1))
        return
    for row in rows:
        ignored = f", ignored {sum(row['ignored'].values())} files" if row["ignored"] else ""
        problems = "".join(f", {count} x {cause}" for cause, count in row["problems"].items())
        print(f"{row['shard']}: {row['samples']} samples, fields {' '.join(row['fields'])}{ignored}{problems}")
    print(f"{len(rows)} shards, {total} samples")
    if any(row["problems"] for row in rows):
        print(f"list the problems: mmvit-data check {spec_text(shards)}")


def tokenizer(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="File to write, such as tokenizer.json.")],
    vocab_size: Annotated[
        int, typer.Option(min=259, max=2**20, help="Maximum size; 259 tokens are bytes and special tokens.")
    ] = 4096,
    source: Annotated[str, typer.Option(help="Caption source: txt, or a path into the JSON such as names.en.")] = "txt",
    as_json: AsJson = False,
) -> None:
    """Train a tokenizer on the captions of shards, and print how many tokens they have."""
    from data_tools.make.tokenizer import train_on_shards
    from data_tools.tar.expand import expand_shards

    report = train_on_shards(expand_shards(shards), out, vocab_size, source)
    if as_json:
        print(json.dumps({"tokenizer": str(out), **report._asdict()}, indent=1))
        return
    skipped = ", ".join(f"{count} x {cause}" for cause, count in report.skipped.items())
    print(f"{out}: {report.captions} captions read, samples skipped: {skipped or 'none'}")
    print(f"  vocabulary {report.vocab_size}, for model.text.vocab_size")
    print(f"  tokens per caption, with start and end: mean {report.mean_length:.1f}, 99 % at most {report.p99_length}")
