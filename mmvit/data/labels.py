"""Labelled images from shards, folders or JSON files, with one numbering of the classes."""

import logging
from array import array
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np

from data_tools.core.errors import DataError, MmvitError, SampleError, UsageError, did_you_mean
from data_tools.core.progress import track
from data_tools.sample.classes import class_numbers, describe_numbers, find_class, order_classes
from data_tools.sample.content import Label
from data_tools.tar.expand import expand_shards
from mmvit.data.folders import LabelledFiles, LabelledNames, list_class_folders, list_json_labels
from mmvit.data.prompts import load_class_names
from mmvit.data.shards import IndexedShards
from mmvit.data.source import RawSample, SampleSource

logger = logging.getLogger(__name__)

_LOOK_UPS = 200_000  # samples whose labels are read when shards are opened, evenly spread: 6 s
_REMOTE_LOOK_UPS = 1000
_NOT_READ = -1
_HINT = "classes=FILE, with one class name per line; line n, counted from 0, is the name of label n"


class LabelledShards(SampleSource):
    """Shards whose samples have a class each: in `.cls` its index, or its name.

    Labels are read when this is made; of very many samples, or remote ones, only some. A sample without a label is a
    `SampleError` when it is read, and so is one of an unknown class that was not found out before.

    Args:
        shards: the samples.
        class_names: None takes the names that are in `.cls`, sorted.

    Raises:
        DataError: no labels, or what `name_classes` refuses.
        UsageError: class names are needed.
    """

    def __init__(self, shards: IndexedShards, class_names: Sequence[str] | None = None):
        self.shards = shards
        self.num_samples: int = shards.num_samples
        self.shard_sizes = shards.shard_sizes
        self.names = shards.names
        found, missing = self._look_up()
        if not found:
            hint = "for a folder with one subfolder per class or a labelled table: mmvit-data make SOURCE OUT"
            raise DataError("the shards contain no labels (.cls)", where=missing[0].where, hint=hint)
        looked_at = len(found) + len(missing)
        if missing:
            what = "%d of %d samples have no valid label and are skipped, such as %s"
            logger.warning(what, len(missing), looked_at, missing[0].where)
        labels = list(found.values())
        if class_names is None and isinstance(labels[0], str) and looked_at < self.num_samples:
            what = f"labels were read from {looked_at} of {self.num_samples} samples; classes may be missing"
            raise UsageError(what, where=shards.paths[0], hint=_HINT)
        samples = list(found)
        self.class_names = name_classes(
            labels, class_names, lambda j: str(self.error("bad-label", "", samples[j]).where)
        )
        self._number_of = class_numbers(self.class_names)
        self.labels = array("q", [_NOT_READ]) * self.num_samples
        for sample, label in found.items():
            self.labels[sample] = self._number_of[label]

    def read(self, i: SupportsIndex, *, image: bool = True) -> RawSample:
        """Return sample `i` with the index of its class."""
        sample = self.shards.read(i, image=image)
        label = self._labelled(sample.label, i)
        if label not in self._number_of:
            raise self.error("bad-label", f"the label {label!r} is not one of the {len(self.class_names)} classes", i)
        return sample._replace(label=self._number_of[label])

    def key(self, i: SupportsIndex) -> str:
        """Return the key of sample `i` in the shards."""
        return self.shards.key(i)

    def error(self, cause: str, what: str, i: SupportsIndex) -> SampleError:
        """Return an error that names sample `i`."""
        return self.shards.error(cause, what, i)

    def shard(self, i: SupportsIndex) -> str:
        """Name the shard of sample `i` without reading anything."""
        return self.shards.shard(i)

    def fingerprint(self) -> str:
        """Return that of the shards."""
        return self.shards.fingerprint()

    def lost(self) -> list[SampleError]:
        """Return what the shards have lost."""
        return self.shards.lost()

    def check_labels(self) -> None:
        """Read all labels that were not read when this was made.

        Raises:
            DataError: a label is no class.
        """
        rest = [i for i, label in enumerate(self.labels) if label == _NOT_READ]
        missing: list[SampleError] = []
        for i in track(rest, len(rest), "reading labels"):
            try:
                label = self._labelled(self.shards.label(i), i)
            except SampleError as error:
                missing.append(error)
                continue
            if label not in self._number_of:
                places = [str(self.error("bad-label", "", i).where)]
                name_classes([label], self.class_names, places.__getitem__)
            self.labels[i] = self._number_of[label]
        if missing and len(rest) > len(missing):  # otherwise they were reported when this was made
            what = "%d of %d samples have no valid label and are left out, such as %s"
            logger.warning(what, len(missing), self.num_samples, missing[0].where)

    def _look_up(self) -> tuple[dict[int, Label], list[SampleError]]:
        """Return the labels of samples by number, and the errors of those that have none."""
        limit = _REMOTE_LOOK_UPS if any(path.is_remote for path in self.shards.paths) else _LOOK_UPS
        found: dict[int, Label] = {}
        missing = []
        for i in range(0, self.num_samples, -(-self.num_samples // limit)):
            try:
                found[i] = self._labelled(self.shards.label(i), i)
            except SampleError as error:
                missing.append(error)
        return found, missing

    def _labelled(self, label: Label | None, i: SupportsIndex) -> Label:
        if label is None:
            raise self.error("bad-label", "the sample has no label", i)
        return label


class Labelled(NamedTuple):
    """Samples whose label i is the class `class_names[i]`."""

    samples: LabelledShards | LabelledFiles
    class_names: list[str]

    def counts(self) -> list[int]:
        """Return how many samples each class has, of those whose label was read when the data were opened."""
        labels = np.asarray(self.samples.labels)
        return np.bincount(labels[labels != _NOT_READ], minlength=len(self.class_names)).tolist()


def open_labelled(
    spec: Sequence[str], classes: str = "", *, known: Sequence[str] | None = None, verify: bool = False
) -> Labelled:
    """Open one folder with a folder for each class, one JSON file of labels, or shards with `.cls`.

    Args:
        spec: the folder, the JSON file, or shards as `expand_shards` takes them. A folder with tars in it is shards.
        classes: class names, a file or a list with commas; "" takes them from the data, where these have names.
        known: the classes of the training data, where other data are opened: `classes` is not looked at.
        verify: compare what is read of shards with the hashes of their indexes.

    Raises:
        UsageError: class names are missing or cannot be used; the folder has no class folders.
        DataError: there are no labels, or one is no class; a folder without images; a file that is missing or broken.
    """
    class_names = list(known) if known is not None else load_class_names(classes) if classes else None
    listed = _list_files(spec, class_names or ())
    if listed is None:
        shards = LabelledShards(IndexedShards(expand_shards(spec), verify, require_caption=False), class_names)
        opened = Labelled(shards, shards.class_names)
    else:
        names = name_classes(listed.labels, class_names, lambda j: str(listed.root / listed.files[j]))
        number_of = class_numbers(names)
        labels = [number for label in listed.labels if (number := find_class(label, number_of)) is not None]
        opened = Labelled(LabelledFiles(listed.root, listed.files, labels), names)
    empty = [name for name, count in zip(opened.class_names, opened.counts(), strict=True) if not count]
    if empty and known is None and _NOT_READ not in opened.samples.labels:
        logger.warning("%d of %d classes have no sample: %s", len(empty), len(opened.class_names), ", ".join(empty[:5]))
    return opened


def name_classes(labels: Sequence[Label], class_names: Sequence[str] | None, where: Callable[[int], str]) -> list[str]:
    """Return the names of the classes by class number: `class_names`, or else `order_classes` of `labels`.

    Args:
        labels: at least one; all numbers, or all names (which may be numbers written as text).
        class_names: what they are to be.
        where: gives the place of a label by its position, for errors.

    Raises:
        DataError: numbers mixed with names, a number that is out of range, or a name that is not in `class_names`, or
            that no file of class names can hold.
        UsageError: numbers without class names.
    """
    kinds = [isinstance(label, str) for label in labels]
    if any(kinds) and not all(kinds):
        name, number = kinds.index(True), kinds.index(False)
        what = f"some labels are names and others are numbers: {labels[name]!r} and {labels[number]}"
        raise DataError(what, where=f"{where(name)}; {where(number)}", hint="use names or numbers for all labels")
    if class_names is None:
        if not kinds[0]:
            raise UsageError("the labels are numbers, and there are no class names", where=where(0), hint=_HINT)
        names = {str(label) for label in labels}
        bad = [name for name in sorted(names) if not name.isprintable() or name != name.strip()]
        if bad:
            what = f"a class name has characters that cannot be shown, or blanks at an end: {bad[0]!a}"
            raise DataError(what, where=where(labels.index(bad[0])), hint="rename the class")
        class_names = order_classes(names)
        for line in describe_numbers(class_names, names):
            logger.info("%s", line)
    number_of = class_numbers(class_names)
    for place, label in enumerate(labels):
        if find_class(label, number_of) is None:
            raise _no_class(label, class_names, where(place))
    return list(class_names)


def _no_class(label: Label, class_names: Sequence[str], where: str) -> DataError:
    if isinstance(label, str):
        hint = did_you_mean(label, class_names) or f"the classes are: {', '.join(class_names[:10])}"
        return DataError(f"the class {label!r} is not one of the {len(class_names)} classes", where=where, hint=hint)
    last = len(class_names) - 1
    return DataError(f"the label {label} is out of range: the classes go from 0 to {last}", where=where, hint=_HINT)


def check_class_names(shards: IndexedShards, class_names: Sequence[str], where: str) -> None:
    """Read all labels of shards; raise an error that names the first sample whose label has no class name.

    Args:
        shards: labelled samples.
        class_names: of the labels.
        where: the file of the class names.

    Raises:
        UsageError: a label has no name.
        DataError: a sample has no label.
    """
    known: set[Label] = {*range(len(class_names)), *class_names}
    missing = 0
    first: SampleError | None = None
    for i in track(range(len(shards)), len(shards), "reading labels"):
        try:
            label = shards.label(i)
        except SampleError as error:
            label, first = None, first or error
        if label is None:
            first = first or shards.error("bad-label", "the sample has no label", i)
            missing += 1
        elif label not in known:
            raise UsageError(
                f"label {label} has no class name: the file has {len(class_names)}",
                where=f"{where}; the label is that of {shards.error('bad-label', '', i).where}",
                hint="name the file that belongs to zero_shot.data; line n, from 0, names label n",
            )
    if first is not None:
        raise DataError(
            f"{missing} of {len(shards)} samples of the evaluation have no valid label; the first: {first.what}",
            where=first.where,
            note="nothing was started: the evaluation at the end of the run would fail",
            hint="write their labels, or evaluate on shards without them: mmvit-data filter",
        )


def class_difference(first: Sequence[str], second: Sequence[str], sides: tuple[str, str]) -> str:
    """Return a description of the first class in which two lists differ, "" if they are equal.

    `sides` are the names of the two lists.
    """
    for number, (one, other) in enumerate(zip_longest(first, second)):
        if one is None or other is None:
            longer, shorter = sides if other is None else sides[::-1]
            return f"class {number}, {one or other!r}, is in {longer} and not in {shorter}"
        if one != other:
            return f"class {number} is {one!r} in {sides[0]} and {other!r} in {sides[1]}"
    return ""


def check_same_classes(
    first: Sequence[str],
    second: Sequence[str],
    sides: tuple[str, str],
    where: str,
    kind: type[MmvitError] = UsageError,
    hint: str = "",
) -> None:
    """Raise an error of this kind, naming the first difference, if two lists of classes differ."""
    difference = class_difference(first, second, sides)
    if difference:
        raise kind(
            f"the classes are not the same: {difference}",
            where=where,
            note="labels would mean other classes; nothing was started",
            hint=hint or f"use the class names in the order of {sides[0]}",
        )


def _list_files(spec: Sequence[str], class_names: Sequence[str]) -> LabelledNames | None:
    """Return what a folder of classes or a JSON file labels; None where shards are named."""
    paths = [Path(part).expanduser() for part in spec if "://" not in part and not part.startswith("pipe:")]
    if len(spec) == len(paths) == 1 and not paths[0].exists() and not set(spec[0]) & set("*?[{"):
        raise DataError(
            "the folder or file does not exist",
            where=spec[0],
            hint="pass a folder with one subfolder per class, a .json or .jsonl file of labels, or shards",
        )
    folders = [path for path in paths if path.is_dir() and not any(path.glob("*.tar"))]
    files = [path for path in paths if path.suffix.lower() in (".json", ".jsonl")]
    if (folders or files) and len(spec) > 1:
        raise UsageError(
            "a folder of classes or a JSON file of labels cannot be combined with other data",
            where=str((folders or files)[0]),
            hint="convert each of them to shards with the same --classnames FILE: mmvit-data make FOLDER SHARDS",
        )
    if folders:
        return list_class_folders(folders[0], class_names)
    return list_json_labels(files[0]) if files else None
