"""Verbs that write demo data sets, which need no download: emoji, digits, synthetic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli.options import DataSetFolder, Engine, ShardSize, Workers, seed_option, split_commas


def emoji(
    out: DataSetFolder,
    held_out: Annotated[str, typer.Option(help="Vendors that go into the val shards; '' for none.")] = "Sams",
    vendors: Annotated[str, typer.Option(help="Vendors to include.")] = "Appl,FB,Goog,Joy,Sams,Twtr,Wind",
    languages: Annotated[str | None, typer.Option(help="Languages of the names, such as en,ko. Default: all.")] = None,
    skin_tones: Annotated[bool, typer.Option("--skin-tones", help="Include variants by skin tone.")] = False,
    labels: Annotated[str, typer.Option(help="names: one class per emoji; groups: the ten Unicode groups.")] = "names",
    shard_size: ShardSize = 1000,
    seed: Annotated[int, seed_option("Order of the training samples.")] = 0,
) -> None:
    """Write emoji images with their names as train and val shards (about 13,000 images of 1,858 emoji).

    With --labels groups, a label is the group of the emoji, such as Food & Drink; groups.txt lists the names.
    """
    from data_tools.demo.emoji import EmojiOptions, write_emoji

    options = EmojiOptions(
        held_out=split_commas(held_out),
        vendors=split_commas(vendors),
        languages=None if languages is None else split_commas(languages),
        skin_tones=skin_tones,
        labels=labels,
        shard_size=shard_size,
        seed=seed,
    )
    report = write_emoji(out, options)
    counts = report.manifest["counts"]
    print(f"{report.folder}: {'already there' if report.was_there else 'written'}")
    print(f"  {counts['classes']} emoji, {counts['train']} images in train, {counts['val']} in val")
    print(f"  {counts['val_left_out_same_as_train']} excluded from val: the same image is in train")
    print(f"  {counts['val_different_pictures']} different images in val")
    for language, equal in counts["names_equal_ignoring_case"].items() if labels == "names" else ():
        from_english = counts["names_from_english"][language]
        if equal or from_english:
            print(f"  names.{language}.txt: {equal} names equal another name, {from_english} taken from English")


def digits(
    out: DataSetFolder,
    seed: Annotated[int, seed_option("Another seed gives another split.")] = 0,
) -> None:
    """Write the handwritten digits of scikit-learn as train and val shards (1,797 images of 8 x 8 px)."""
    from data_tools.demo.digits import write_digits

    report = write_digits(out, seed)
    print(f"{out}: {'already there' if report['was_there'] else 'written'}")
    print(f"  {report['train']} images in train, {report['val']} in val, class names in classes.txt")


def synthetic(
    out: Annotated[Path, typer.Argument(help="Folder to create; a killed run resumes in it.")],
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Total number of samples, evenly distributed.")] = 1000,
    width: Annotated[int, typer.Option(min=1, help="Image width, px.")] = 500,
    height: Annotated[int, typer.Option(min=1, help="Image height, px.")] = 375,
    quality: Annotated[int, typer.Option(min=1, max=95, help="JPEG quality.")] = 87,
    seed: Annotated[int, seed_option("Another seed gives other samples.")] = 0,
    workers: Workers = None,
    engine: Engine = "local",
) -> None:
    """Write photo-like JPEGs with captions for load tests; each sample depends only on its number, seed and size."""
    from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic

    photos = SyntheticPhotos(width, height, quality, seed)
    sizes = {"num_shards": shards, "num_samples": samples}
    report = write_synthetic(out, photos, **sizes, num_workers=workers, engine=engine)
    print(f"{out}: {'already there' if report['was_there'] else 'written'}")
    print(f"  {samples} samples in {shards} shards, {report['bytes'] / 1e6:.1f} MB")
