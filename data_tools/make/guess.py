"""What a source is, where nobody says so: its kind, the table that holds its captions, the folder of its images."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from data_tools.core.errors import MmvitError, UsageError
from data_tools.core.folders import doubtful_class, doubtful_classes
from data_tools.make import csv_rows, tables
from data_tools.make.coco import looks_like_coco
from data_tools.make.folder_rows import TABLES, look_at, may_hold_captions
from data_tools.make.options import KINDS
from data_tools.make.tables import ColumnChoice, Table

# Of Flickr8k (captions.txt) and Flickr30k (results.csv): tables that are taken by themselves.
_CAPTION_TABLES = ("captions.txt", "captions.csv", "captions.tsv", "captions.jsonl", "results.csv")
_KINDS = {**TABLES, ".txt": "csv", ".json": "coco"}  # of files whose content is looked at
_MAX_DEPTH = 5  # of containers in containers
_LOOK_UPS = 20  # paths of a table


def guess_source(path: Path) -> tuple[Path, str]:
    """Return what to read of a source, and its kind: a folder of images next to a table of captions is that table.

    Raises:
        UsageError: it is nothing that is known, or several data sets.
    """
    kind = find_kind(path)
    if kind in ("folder", "classes") and path.is_dir() and not look_at(path).has_texts:
        table = caption_table(path)
        if table is not None:
            return table, kind_of_table(table)
    return path, kind


def caption_table(folder: Path) -> Path | None:
    """Return the table in a folder that holds captions by its name and its columns; None if it is not exactly one."""
    named = [child for child in sorted(folder.iterdir()) if child.name.lower() in _CAPTION_TABLES]
    usable = [table for table in named if kind_of_table(table)]
    return usable[0] if len(usable) == 1 else None


def find_kind(path: Path) -> str:
    """Return the kind of a source, by what it holds.

    Raises:
        UsageError: it is nothing that is known, or several data sets.
    """
    if not path.is_dir():
        kind = TABLES.get(path.suffix.lower()) or kind_of_table(path)
        if not kind:
            known = ", ".join(TABLES)
            hint = f"pass a folder or a file ending in {known}; or set its kind: --kind {'|'.join(KINDS)}"
            what = f"{path.suffix or 'a file without suffix'} is not a supported source"
            raise UsageError(what, where=str(path), hint=hint)
        return kind
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
        hint = f"convert each of them to a separate folder: mmvit-data make {path}/SPLIT OUT"
        raise UsageError(f"the folder contains several data sets: {splits}", where=str(path), hint=hint)
    suffixes = set()
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.endswith(".tar.meta.parquet"):
                continue  # what mmvit-data stats writes next to a shard
            is_stats = entry.name.endswith("_stats.json")
            suffixes.add("_stats.json" if is_stats else "/" if entry.is_dir() else Path(entry.name).suffix.lower())
    if ".arrow" in suffixes:
        return "datasets"
    if "_stats.json" in suffixes and suffixes & {".tar", "/"}:
        return "img2dataset"
    if ".parquet" in suffixes:
        return "parquet"
    if ".tar" in suffixes:
        hint = f"they can be used directly: mmvit-data check {path} (tars of img2dataset: --kind img2dataset)"
        raise UsageError("the folder already contains tars", where=str(path), hint=hint)
    return look_at(path).kind


def kind_of_table(path: Path) -> str:
    """Return the kind of a table whose columns are known by their names; "" for any other file."""
    if not path.is_file():
        return ""
    kind = _KINDS.get(path.suffix.lower(), "")
    try:
        if kind == "coco":
            return kind if looks_like_coco(path) else ""
        if kind == "parquet":
            table = tables.open_parquet([path])
        elif kind == "jsonl":
            table = Table(tables.jsonl_names(path))
        elif kind:
            table = Table(csv_rows.read_format(path, None).names)
        else:
            return ""
        tables.choose_columns(table, ColumnChoice(), path)
    except (MmvitError, OSError):
        return ""
    return kind


def check_guess(path: Path, folders: Sequence[str], found: Sequence[str]) -> None:
    """Raise UsageError where a folder was taken for class folders, and there is doubt: names would become captions.

    Args:
        path: the folder.
        folders: those of the top that hold images.
        found: files that may hold captions, relative to the folder.
    """
    doubt = doubtful_classes(folders)
    if not doubt and found:
        doubt = f"the captions may be in {', '.join(found[:3])}{' and others' if len(found) > 3 else ''}"
    if not doubt:
        return
    commands = [command(path / name) for name in found[:_LOOK_UPS] if kind_of_table(path / name)][:3]
    inner = _inner_folder(path)
    if inner is not None:
        commands.append(command(inner) + (" (the others too)" if len(folders) > 1 else ""))
    commands += ["if each folder is a class: the same command with --kind classes"]
    commands += ["for images without captions: --kind folder --no-captions"]
    raise UsageError(
        f"it is not clear where the captions are: {doubt}",
        where=str(path),
        note="nothing was started; else the names of the folders would become captions and classes",
        hint="; ".join(commands),
    )


def command(source: Path) -> str:
    """Return the command that makes shards of a source."""
    return f"mmvit-data make {shlex.quote(str(source))} OUT"


def tables_near(folder: Path) -> list[Path]:
    """Return the tables in a folder, or else in its parent, whose columns are known."""
    for place in (folder, folder.parent):
        files = [child for child in sorted(place.iterdir()) if may_hold_captions(child.name)]
        if usable := [child for child in files[:_LOOK_UPS] if kind_of_table(child)]:
            return usable
    return []


def _inner_folder(path: Path, depth: int = 0) -> Path | None:
    """Return a folder inside the only, or a doubtful, folder that can be made as it is; None if there is none."""
    looks = look_at(path)
    if looks.kind == "folder" or depth == _MAX_DEPTH:
        return None
    inner = [path / name for name in looks.folders if doubtful_class(name) or len(looks.folders) == 1][:_LOOK_UPS]
    return next(filter(_is_clear, inner), None) or next(
        filter(None, (_inner_folder(at, depth + 1) for at in inner)), None
    )


def _is_clear(path: Path) -> bool:
    """Return whether a folder, by its names, is made without `check_guess` refusing it."""
    looks = look_at(path)
    is_classes = looks.kind == "classes" and not looks.tables and not doubtful_classes(looks.folders)
    return looks.has_texts or caption_table(path) is not None or is_classes


def folder_of_images(table: Path, paths: Sequence[str]) -> Path:
    """Return the folder that the paths in a table start from: the table's own, or one in it or next to it.

    Args:
        table: the table, or the folder of its files.
        paths: of some images.

    Raises:
        UsageError: several folders have them.
    """
    start = table if table.is_dir() else table.parent
    names = [path for path in paths if not Path(path).is_absolute() and "://" not in path][:_LOOK_UPS]
    if not names or _count(start, names):
        return start
    below = [folder for child in _folders_in(start) for folder in (child, *_folders_in(child))]
    beside = [folder for folder in _folders_in(start.parent) if folder != start and doubtful_class(folder.name)]
    for folders in (below, beside):
        counts = {folder: count for folder in folders if (count := _count(folder, names))}
        best = [folder for folder, count in counts.items() if count == max(counts.values())]
        if len(best) == 1:
            return best[0]
        if best:
            what = f"the images of the table are in {len(best)} folders: {', '.join(map(str, best[:5]))}"
            raise UsageError(what, where=str(table), hint=f"name one of them: --image-root {shlex.quote(str(best[0]))}")
    return start


def _count(folder: Path, names: Sequence[str]) -> int:
    return sum(os.path.lexists(os.path.join(folder, name)) for name in names if "\0" not in name)  # noqa: PTH118


def _folders_in(path: Path) -> list[Path]:
    """Return the visible folders in a folder, without links, sorted."""
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [path / name for name in sorted(names) if not name.startswith(".")]
