"""The `mmvit-data` program: one short function a verb, heavy imports inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_tools.program import run_program

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make and look after shards of image-text pairs. An error is told in words; --debug adds its traceback.",
)


@app.callback()
def _verbs() -> None:
    """Keeps the verbs' names also while there are few of them."""


@app.command()
def emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make; a finished data set of equal options is kept.")],
    held_out: Annotated[str, typer.Option(help="Vendors that go into the val shards; '' for none.")] = "Sams",
    vendors: Annotated[str, typer.Option(help="Vendors to take.")] = "Appl,FB,Goog,Joy,Sams,Twtr,Wind",
    languages: Annotated[str | None, typer.Option(help="Languages of the names, as en,ko. Default: all.")] = None,
    skin_tones: Annotated[bool, typer.Option("--skin-tones", help="Also the variants by skin tone.")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Order of the training samples.")] = 0,
) -> None:
    """Write emoji drawings with their names as train and val shards (about 13,000 pictures of 1,858 emoji)."""
    from data_tools.emoji import EmojiOptions, write_emoji

    options = EmojiOptions(
        held_out=_split(held_out),
        vendors=_split(vendors),
        languages=None if languages is None else _split(languages),
        skin_tones=skin_tones,
        shard_size=shard_size,
        seed=seed,
    )
    report = write_emoji(out, options)
    counts = report.manifest["counts"]
    print(f"{report.folder}: {'already there' if report.was_there else 'written'}")
    print(f"  {counts['classes']} emoji, {counts['train']} pictures in train, {counts['val']} in val")
    print(f"  {counts['val_left_out_same_as_train']} left out of val: the same picture is in train")
    print(f"  {counts['val_different_pictures']} different pictures in val")
    for language, equal in counts["names_equal_ignoring_case"].items():
        from_english = counts["names_from_english"][language]
        if equal or from_english:
            print(f"  names.{language}.txt: {equal} names equal another one, {from_english} taken from English")


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="Tars, folders, ranges {000..012} or globs.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the index again, whatever is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the index NAME.tar.idx of each shard that has none or a stale one, and list what the shards hold."""
    from data_tools.expand import expand_shards
    from data_tools.tar_index import build_index, open_index

    rows = []
    for tar in expand_shards(shards):
        opened = build_index(tar) if rebuild else open_index(tar)
        row = {"shard": str(tar), "samples": len(opened), "fields": opened.fields, "ignored": opened.ignored}
        rows.append({**row, "bytes": opened.tar_size})
        if not as_json:
            ignored = f", ignored {sum(opened.ignored.values())} files" if opened.ignored else ""
            print(f"{tar}: {len(opened)} samples, fields {' '.join(opened.fields)}{ignored}", flush=True)
    total = sum(len_ for row in rows if isinstance(len_ := row["samples"], int))
    if as_json:
        print(json.dumps({"shards": rows, "samples": total}, indent=1))
    else:
        print(f"{len(rows)} shards, {total} samples")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def main() -> None:
    """Run `mmvit-data`."""
    run_program(app, "mmvit-data")


if __name__ == "__main__":
    main()
