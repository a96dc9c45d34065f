"""The `mmvit-data` program: one short function a verb, heavy imports inside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.core.program import print_version, run_program

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make and look after shards of image-text pairs. An error is told in words; --debug adds its traceback.",
)

_VERSION = typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
_SHARDS = "Tars, folders, ranges {000..012} or globs."
_WORKERS = "Processes; by default one a core."
_KINDS = "folder, classes, csv, tsv, jsonl, parquet, img2dataset or datasets; by default found out."
_ENGINE = "local, or ray for a cluster (the extra ray)."
_NEW_FOLDER = "Folder to make for the new shards; a killed run goes on."


@app.callback()
def _verbs(version: Annotated[bool, _VERSION] = False) -> None:
    """Keeps the verbs' names also while there are few of them."""


@app.command()
def emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make; a finished data set of equal options is kept.")],
    held_out: Annotated[str, typer.Option(help="Vendors that go into the val shards; '' for none.")] = "Sams",
    vendors: Annotated[str, typer.Option(help="Vendors to take.")] = "Appl,FB,Goog,Joy,Sams,Twtr,Wind",
    languages: Annotated[str | None, typer.Option(help="Languages of the names, as en,ko. Default: all.")] = None,
    skin_tones: Annotated[bool, typer.Option("--skin-tones", help="Also the variants by skin tone.")] = False,
    labels: Annotated[str, typer.Option(help="names: a class an emoji | groups: the ten of Unicode.")] = "names",
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Order of the training samples.")] = 0,
) -> None:
    """Write emoji drawings with their names as train and val shards (about 13,000 pictures of 1,858 emoji).

    With --labels groups a label is the group of the emoji, such as Food & Drink, and groups.txt names them.
    """
    from data_tools.demo.emoji import EmojiOptions, write_emoji

    options = EmojiOptions(
        held_out=_split(held_out),
        vendors=_split(vendors),
        languages=None if languages is None else _split(languages),
        skin_tones=skin_tones,
        labels=labels,
        shard_size=shard_size,
        seed=seed,
    )
    report = write_emoji(out, options)
    counts = report.manifest["counts"]
    print(f"{report.folder}: {'already there' if report.was_there else 'written'}")
    print(f"  {counts['classes']} emoji, {counts['train']} pictures in train, {counts['val']} in val")
    print(f"  {counts['val_left_out_same_as_train']} left out of val: the same picture is in train")
    print(f"  {counts['val_different_pictures']} different pictures in val")
    for language, equal in counts["names_equal_ignoring_case"].items() if labels == "names" else ():
        from_english = counts["names_from_english"][language]
        if equal or from_english:
            print(f"  names.{language}.txt: {equal} names equal another one, {from_english} taken from English")


@app.command()
def digits(
    out: Annotated[Path, typer.Argument(help="Folder to make; a finished data set of equal options is kept.")],
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed gives another split.")] = 0,
) -> None:
    """Write the handwritten digits of scikit-learn as train and val shards (1,797 pictures of 8 x 8 px)."""
    from data_tools.demo.digits import write_digits

    report = write_digits(out, seed)
    print(f"{out}: {'already there' if report['was_there'] else 'written'}")
    print(f"  {report['train']} pictures in train, {report['val']} in val, class names in classes.txt")


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="Tars, folders, ranges {000..012} or globs.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the index again, whatever is there.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the index NAME.tar.idx of each shard that has none or a stale one, and list what the shards hold."""
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
        print(f"what the problems are: mmvit-data check {spec_text(shards)}")


@app.command()
def check(
    shards: Annotated[list[str], typer.Argument(help=_SHARDS)],
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every picture, or read headers.")] = True,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read every byte of the shards again and list what is damaged; exit 3 where something is, 0 where all is whole."""
    from data_tools.examine.check import check_shards, describe
    from data_tools.tar.expand import expand_shards

    report = check_shards(expand_shards(shards), decode=decode, num_workers=workers, engine=engine)
    print(json.dumps(report.to_json(), indent=1) if as_json else describe(report, shards))
    if report.is_damaged:
        raise typer.Exit(3)


@app.command()
def repair(
    shards: Annotated[list[str], typer.Argument(help=_SHARDS)],
    out: Annotated[Path, typer.Option(help="Folder to make, for the new shards; the old ones stay as they are.")],
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write new shards with every sample that is whole; rejected.jsonl lists what was left out, and why."""
    from data_tools.examine.repair import describe, repair_shards
    from data_tools.tar.expand import expand_shards

    report = repair_shards(expand_shards(shards), out, num_workers=workers, engine=engine)
    print(json.dumps(report.to_json(), indent=1) if as_json else describe(report))


@app.command()
def synthetic(
    out: Annotated[Path, typer.Argument(help="Folder to make; an unfinished one of equal options is completed.")],
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Samples in all shards together, shared out evenly.")] = 1000,
    width: Annotated[int, typer.Option(min=1, help="Of each picture, px.")] = 500,
    height: Annotated[int, typer.Option(min=1, help="Of each picture, px.")] = 375,
    quality: Annotated[int, typer.Option(min=1, max=95, help="Of the JPEG.")] = 87,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed gives other samples.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
) -> None:
    """Write photo-like JPEGs with captions, for load tests: sample I depends on the seed and the size only."""
    from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic

    photos = SyntheticPhotos(width, height, quality, seed)
    sizes = {"num_shards": shards, "num_samples": samples}
    report = write_synthetic(out, photos, **sizes, num_workers=workers, engine=engine)
    print(f"{out}: {'already there' if report['was_there'] else 'written'}")
    print(f"  {samples} samples in {shards} shards, {report['bytes'] / 1e6:.1f} MB")


@app.command()
def tokenizer(
    shards: Annotated[list[str], typer.Argument(help="Tars, folders, ranges {000..012} or globs.")],
    out: Annotated[Path, typer.Option(help="File to write, as tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(min=259, max=2**20, help="At most; 259 are bytes and marks.")] = 4096,
    source: Annotated[str, typer.Option(help="txt, or a path into the JSON such as names.en.")] = "txt",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train a tokenizer on the captions of shards, and tell how many tokens they have."""
    from data_tools.make.tokenizer import train_on_shards
    from data_tools.tar.expand import expand_shards

    report = train_on_shards(expand_shards(shards), out, vocab_size, source)
    if as_json:
        print(json.dumps({"tokenizer": str(out), **report._asdict()}, indent=1))
        return
    skipped = ", ".join(f"{count} x {cause}" for cause, count in report.skipped.items())
    print(f"{out}: {report.captions} captions read, samples skipped: {skipped or 'none'}")
    print(f"  vocabulary {report.vocab_size}, for model.text.vocab_size")
    print(f"  tokens a caption, with start and end: mean {report.mean_length:.1f}, 99 % at most {report.p99_length}")


@app.command()
def stats(
    shards: Annotated[list[str], typer.Argument(help=_SHARDS)],
    picture: Annotated[Path | None, typer.Option(help="Also draw the distributions, as a PNG.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Count what the shards hold: pictures, captions, languages, labels, duplicates; keeps a table by each shard."""
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


@app.command()
def peek(
    shards: Annotated[list[str], typer.Argument(help=_SHARDS)],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    num: Annotated[int, typer.Option("-n", min=1, max=1000, help="Number of samples.")] = 24,
    seed: Annotated[int, typer.Option(help="Another seed draws other samples.")] = 0,
    key: Annotated[list[str] | None, typer.Option(help="This sample instead; may be given again.")] = None,
    font: Annotated[Path | None, typer.Option(help="Font file; by default one of this machine that fits.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Draw a sheet of pictures with their captions, and print keys and captions."""
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
        print(f"{sample.shard}/{sample.key}\t{sample.told}")
    if lacking:
        print(f"no font of this machine has: {' '.join(sorted(lacking))}; give one with --font", file=sys.stderr)


@app.command()
def make(
    source: Annotated[Path, typer.Argument(help="File or folder of pictures with texts or classes.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; a run that was killed goes on in it.")],
    kind: Annotated[str | None, typer.Option(help=_KINDS)] = None,
    image_column: Annotated[str | None, typer.Option(help="Of a table; default: by its usual names.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="One, or several with commas between.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Class numbers or names; '' for none.")] = None,
    no_captions: Annotated[bool, typer.Option("--no-captions", help="Pictures alone, or with labels.")] = False,
    template: Annotated[str | None, typer.Option(help="Captions from class names: 'a photo of a {}'.")] = None,
    classnames: Annotated[Path | None, typer.Option(help="File that numbers the classes, as of another split.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where paths start, and what none may leave.")] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Shorter side of larger pictures, px.")] = None,
    image_format: Annotated[str, typer.Option("--format", help="keep, jpg, webp or png.")] = "keep",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP encoded anew.")] = 95,
    allow_formats: Annotated[str, typer.Option(help="Further ones to read: gif,bmp,tiff.")] = "",
    shard_size: Annotated[int, typer.Option(min=1, help="Rows a shard.")] = 1000,
    shuffle: Annotated[int | None, typer.Option(min=0, help="Seed of the order; 0 where there are labels.")] = None,
    in_order: Annotated[bool, typer.Option("--in-order", help="Never shuffle.")] = False,
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Share of rejected rows above which it exits 3.")] = 0.01,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make shards of a folder, table, img2dataset output or Hugging Face data set; nothing is downloaded.

    Each picture is decoded once. A row that gives no sample is listed with its reason in OUT/rejected.jsonl.

    Killed and run again, it goes on. Equal sources and options give equal bytes with any number of workers.
    """
    from data_tools.make.options import MakeOptions
    from data_tools.make.run import check_rejected, describe, make_shards

    options = MakeOptions(
        kind=kind,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        captions=not no_captions,
        template=template,
        classnames=classnames,
        image_root=image_root,
        resize=resize,
        image_format=image_format,
        quality=quality,
        allow_formats=_split(allow_formats),
        shard_size=shard_size,
        shuffle=shuffle,
        in_order=in_order,
    )
    report = make_shards(source, out, options, num_workers=workers, engine=engine)
    print(json.dumps(vars(report), indent=1) if as_json else describe(report))
    check_rejected(report, max_bad)


@app.command()
def reshard(
    shards: Annotated[list[str], typer.Argument(help=_SHARDS)],
    out: Annotated[Path, typer.Option(help=_NEW_FOLDER)],
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    shuffle: Annotated[int | None, typer.Option(min=0, help="Seed of a random order over all shards.")] = None,
    keys: Annotated[Path | None, typer.Option(help="Samples to take: a KEY or SHARD.tar/KEY a line, or .npy.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Merge, split, shuffle or pick samples into new shards; their bytes are copied as they are, and checked."""
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
        print(f"  {len(unknown)} keys of the list name no sample, see {out / module.UNKNOWN}: {named}")


@app.command("filter")
def filter_(
    shards: Annotated[list[str], typer.Argument(help=_SHARDS)],
    where: Annotated[str, typer.Option(help="Condition that the samples must meet.")],
    out: Annotated[Path | None, typer.Option(help=_NEW_FOLDER)] = None,
    scores: Annotated[Path | None, typer.Option(help="Parquet file with the column key and more columns.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    shuffle: Annotated[int | None, typer.Option(min=0, help="Seed of a random order over all shards.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the samples that meet a condition as new shards; OUT/dropped.txt lists the others.

    Example: --where "width >= 256 and aspect < 3 and language in ('en', 'ko') and not 'logo' in lower(caption)".
    There are comparisons, in, is None, and, or, not, + - * /, lower, contains, startswith, endswith and matches (a
    regular expression). Columns: key width height aspect image_format image_bytes caption caption_chars caption_words
    script language label label_name image_sha256 bad, and those of --scores. Comparisons with missing values are false.
    """
    from data_tools.select.filter import filter_samples
    from data_tools.select.write import OutputOptions
    from data_tools.tar.expand import expand_shards

    if out is None and not dry_run:
        raise typer.BadParameter("--out DIR is needed, or --dry-run")
    output = None if dry_run or out is None else OutputOptions(out, shard_size, shuffle, workers, engine)
    tars = expand_shards(shards)
    report = filter_samples(tars, where, scores=scores, output=output, num_workers=workers, engine=engine)
    print(json.dumps(report.to_json(), indent=1) if as_json else report.describe())


@app.command()
def dedup(
    shards: Annotated[list[str], typer.Argument(help=_SHARDS)],
    out: Annotated[Path | None, typer.Option(help=_NEW_FOLDER + " Default: only look.")] = None,
    threshold: Annotated[int, typer.Option(help="Bits in which the hashes of near copies may differ, 0 .. 12.")] = 4,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Only equal files; nothing is decoded.")] = False,
    report: Annotated[Path | None, typer.Option(help="JSONL file to write, with a line for each group.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE)] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find pictures that are there more than once, and with --out write the shards without them.

    Of near copies the largest picture is kept, of equal ones the first; the captions of the others go with them.
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


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def main() -> None:
    """Run `mmvit-data`."""
    run_program(app, "mmvit-data")


if __name__ == "__main__":
    main()
