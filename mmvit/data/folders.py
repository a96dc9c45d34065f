"""Labelled image files: in a folder for each class, or listed with their classes in a JSON file."""

import hashlib
import json
import logging
import operator
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.core.files import UnreadableError, read_regular
from data_tools.core.folders import describe_skipped, doubtful_classes, image_files
from data_tools.sample.content import Label
from data_tools.tar.location import Location
from data_tools.tar.reader import MAX_BYTES
from data_tools.tar.shard_names import ShardNames
from mmvit.data.source import RawSample, SampleSource

logger = logging.getLogger(__name__)

_LOOK_UPS = 100  # of the files that a JSON names


class LabelledNames(NamedTuple):
    """Files below `root` and what each is labelled with."""

    root: Path
    files: list[str]
    labels: list[Label]


class LabelledFiles(SampleSource):
    """Image files, read as if they were the samples of one shard; a sample's key is its path below `root`.

    Links are followed as long as they lead to files below `root`. A file that cannot be read, or is no image, is a
    `SampleError` when its turn comes, like an invalid sample of a shard.

    Args:
        root: the folder.
        files: their paths below `root`, with "/" in them.
        labels: the class index of each.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int]):
        encoded = [os.fsencode(file) for file in files]
        self.root = root
        self.num_samples: int = len(files)
        self.shard_sizes = (len(files),)
        self.names = ShardNames([Location(root)])
        self.labels = array("q", labels)
        self._real_root = Path(os.path.realpath(root))
        # Two objects rather than a million: workers that are forked would copy these page by page.
        self._names = b"".join(encoded)
        self._ends = array("q", accumulate(map(len, encoded)))

    def key(self, i: SupportsIndex) -> str:
        """Return the path of file `i` below the root."""
        number = operator.index(i)
        if not 0 <= number < self.num_samples:
            raise IndexError(f"there are {self.num_samples} files, not a file {number}")
        return os.fsdecode(self._names[self._ends[number - 1] if number else 0 : self._ends[number]])

    def read(self, i: SupportsIndex, *, image: bool = True) -> RawSample:
        """Return file `i`, whatever its format, with its label; `image=False` does not read the file.

        Raises:
            SampleError: it cannot be read, is no file, is empty, is too large, or lies outside of the root.
        """
        return RawSample(self.key(i), self._content(i) if image else b"", None, None, self.labels[i])

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the files' names, sizes and labels, in their order.

        The root's own name and the files' times are not part of it. Nor is their content, whose hash would cost a pass
        over all of them: an image that is replaced by one of the same size goes unseen.
        """
        digest = hashlib.sha256()
        for i, label in enumerate(self.labels):
            try:
                size = (self._real_root / self.key(i)).stat().st_size
            except (OSError, ValueError):  # reported when it is read
                size = -1
            digest.update(json.dumps([self.key(i), size, label]).encode())
        return digest.hexdigest()

    def shard(self, i: SupportsIndex) -> str:
        """Name the folder."""
        return str(self.root)

    def error(self, cause: str, what: str, i: SupportsIndex) -> SampleError:
        """Return an error that names file `i`."""
        return SampleError(cause, what, shard=str(self.root), key=self.key(i), hint=None)

    def check_labels(self) -> None:
        """Do nothing: all labels are known."""

    def _content(self, i: SupportsIndex) -> bytes:
        try:
            path = Path(os.path.realpath(self._real_root / self.key(i)))
            if not path.is_relative_to(self._real_root):
                raise self.error("no-image", f"it leads outside of the folder, to {path}", i)
            content = read_regular(path, MAX_BYTES["jpg"])
        except UnreadableError as error:
            raise self.error(error.cause, error.what, i) from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise self.error("no-image", f"the file cannot be read: {error}", i) from error
        if not content:
            raise self.error("no-image", "the sample has no image: the image is an empty file", i)
        return content


def list_class_folders(root: Path, allowed: Collection[str] = ()) -> LabelledNames:
    """Return the images in each folder of `root`, and in the folders below these, with the folder as their label.

    Hidden files and folders, links to folders and files that are no images are skipped and counted.

    Args:
        root: the folder.
        allowed: names that are classes whatever they look like.

    Raises:
        UsageError: no folders, or by their names they are hardly classes.
        DataError: a folder without an image.
    """
    aside: Counter[str] = Counter()
    files: list[str] = []
    counts: Counter[str] = Counter()
    for folder, images in image_files(root, aside):
        name = folder.partition("/")[0]
        if name:
            counts[name] += len(images)
            files += [f"{folder}{image}" for image in images]
        else:
            aside["image in no class folder"] += len(images)
    _check_folders(root, counts, allowed)
    if skipped := describe_skipped(aside):
        logger.warning("%s: %s", root, skipped)
    return LabelledNames(root, files, [file.partition("/")[0] for file in files])


def _check_folders(root: Path, counts: Counter[str], allowed: Collection[str]) -> None:
    if not counts:
        raise UsageError(
            "the folder contains no class folders",
            where=str(root),
            hint=f"put the images of each class into a separate folder, such as {root / 'cat' / '1.jpg'}; "
            "or pass a JSON file that maps images to classes, or shards with .cls",
        )
    if not counts.keys() <= set(allowed) and (doubt := doubtful_classes(counts)):
        hint = (
            f"pass the folder that contains the class folders, such as {root / min(counts)}; or, if these are classes: "
        )
        raise UsageError(doubt, where=str(root), hint=f"{hint}classes=FILE that lists them, one per line")
    empty = sorted(name for name in counts if not counts[name])
    if empty:
        what = f"{len(empty)} of {len(counts)} class folders contain no image: {', '.join(empty[:5])}"
        raise DataError(what, where=str(root), hint="add images to each of them, or remove them")


def list_json_labels(path: Path) -> LabelledNames:
    """Return the files that a JSON file labels; their paths start at its folder.

    It is an object {"FILE": LABEL}, a list of {"file": FILE, "label": LABEL}, or (`.jsonl`) one such object per line.
    A label is a class name, or a number.

    Raises:
        DataError: it has another form, lists a file twice, or all listed files are missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(_json_lines(text) if path.suffix.lower() == ".jsonl" else _json_rows(text))
    except OSError as error:
        raise DataError(
            f"the labels cannot be read: {error.strerror}", where=str(path), hint="check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _not_labels(path, f"the file is not JSON ({error})") from error
    files: dict[str, Label] = {}
    root = Path(os.path.realpath(path.parent))
    for place, row in rows:
        if not _is_labelled(row):
            raise _not_labels(path, f"{place} is not a file with a label: {json.dumps(row)[:80]}")
        file, label = os.path.normpath(row[0]), row[1]
        if not Path(os.path.normpath(root / file)).is_relative_to(root):
            what = f"{place} refers to a file outside of the folder of the JSON file: {row[0]!r}"
            raise DataError(what, where=str(path), hint="move the JSON file to a folder that contains all of the files")
        if file in files:
            what = f"{place} lists a file for the second time: {row[0]!r}"
            raise DataError(what, where=str(path), hint="keep one of its labels")
        files[file] = label
    if not files:
        raise _not_labels(path, "it lists no file")
    if not any((path.parent / file).exists() for file in islice(files, _LOOK_UPS)):
        first = next(iter(files))
        raise DataError(
            f"listed files are missing, such as {first!r}",
            where=str(path),
            hint=f"paths are relative to the folder of the JSON file, {path.parent}: correct them, or move the file",
        )
    return LabelledNames(path.parent, list(files), list(files.values()))


def _not_labels(path: Path, what: str) -> DataError:
    hint = (
        'write {"FILE": "CLASS", ...}, or [{"file": "FILE", "label": "CLASS"}, ...], in .jsonl one such object per line'
    )
    return DataError(what, where=str(path), hint=hint)


def _json_rows(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the (file, label) of each entry; entries of another form are returned unchanged."""
    whole = json.loads(text, object_pairs_hook=tuple)  # a dict would lose duplicate keys
    is_map = isinstance(whole, tuple)
    for number, entry in enumerate(whole if isinstance(whole, tuple | list) else [whole], start=1):
        yield f"entry {number}", entry if is_map else _file_and_label(entry)


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", _file_and_label(json.loads(line, object_pairs_hook=tuple))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _file_and_label(entry: Any) -> Any:
    fields = dict(entry) if isinstance(entry, tuple) else {}
    return (fields["file"], fields["label"]) if {"file", "label"} <= fields.keys() else entry


def _is_labelled(row: Any) -> bool:
    match row:
        case (str(file), int() | str() as label):
            return bool(file) and label != "" and not isinstance(label, bool)
    return False
