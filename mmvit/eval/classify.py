"""Image classification: accuracy on labelled images, and the best classes of unlabelled ones.

The classifier is a supervised one, or a zero-shot one made from class names and prompt templates.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.core.folders import list_images
from data_tools.core.names import store_name
from data_tools.core.progress import track
from data_tools.sample.content import Label
from data_tools.sample.decode import ImageError, decode_image, read_image
from data_tools.tar.expand import expand_shards
from mmvit.data.shards import IndexedShards
from mmvit.data.source import SampleSource, some_samples
from mmvit.data.transforms import Pixels, eval_pixels
from mmvit.eval.encoder import refuse_zero
from mmvit.models.classifier import ImageClassifier

logger = logging.getLogger(__name__)

BATCH_SIZE = 256
_MAX_BAD = 0.01  # share of the images in folders; one may always be bad
_SHOWN = 10  # rejected images
_LOOK_UPS = 50


class Accuracy(NamedTuple):
    """Top-1 and top-5 accuracy.

    Attributes:
        acc1: in [0, 1].
        acc5: in [0, 1].
        labels: class of each image.
        best: best classes of each image, best first.
        samples: number of each image in the source.
        num_bad: invalid samples, which are not counted.
    """

    acc1: float
    acc5: float
    labels: Int[Tensor, " M"]
    best: Int[Tensor, "M k"]
    samples: Int[Tensor, " M"]
    num_bad: int


class Prediction(NamedTuple):
    """The best classes of one image, each {"name", "probability"}, best first."""

    image: str
    classes: list[dict[str, Any]]


@torch.inference_mode()
def evaluate_classifier(
    model: ImageClassifier,
    source: SampleSource,
    image_size: int,
    limit: int | None = None,
    before_each_batch: Callable[[], None] = lambda: None,
    *,
    class_of_label: Mapping[Label, int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Accuracy:
    """Measure accuracy on labelled images; invalid samples are skipped, logged and counted.

    Args:
        model: in evaluation mode.
        source: the images; no stream.
        image_size: of the model, px.
        limit: number of samples, spread evenly over all; None for all.
        before_each_batch: may raise to end the evaluation.
        class_of_label: class of each label; None if label i is class i.
        batch_size: images that are classified together.

    Raises:
        DataError: a label without a class; or all samples are invalid.
    """
    assert source.num_samples is not None, "a stream has no end"
    refuse_zero(batch_size=batch_size, limit=1 if limit is None else limit)
    classes: Mapping[Label, int] = (
        {i: i for i in range(len(model.class_names))} if class_of_label is None else class_of_label
    )
    limit = source.num_samples if limit is None else min(limit, source.num_samples)
    chosen = torch.linspace(0, source.num_samples - 1, limit, dtype=torch.float64).long().tolist()
    labels: list[int] = []
    samples: list[int] = []
    best: list[Tensor] = []
    bad: list[DataError] = []
    for start in range(0, limit, batch_size):
        before_each_batch()
        pixels: list[Pixels] = []
        for i in chosen[start : start + batch_size]:
            try:
                sample = source.read(i)
                image = eval_pixels(decode_image(sample.image, where=sample.key), image_size)
            except (SampleError, ImageError) as error:
                bad.append(error)
                continue
            labels.append(_class_of(sample.label, classes, sample.key))
            samples.append(i)
            pixels.append(image)
        if pixels:
            best.append(_logits(model, pixels).topk(min(5, len(model.class_names))).indices.cpu())
    _report_bad(bad, limit)
    target, found = torch.tensor(labels), torch.cat(best)
    hits = found == target[:, None]
    acc1, acc5 = hits[:, 0].float().mean().item(), hits.any(dim=1).float().mean().item()
    return Accuracy(acc1, acc5, target, found, torch.tensor(samples), len(bad))


def check_images(source: SampleSource) -> None:
    """Raise DataError if none of some images can be decoded; one that can is enough."""
    assert source.num_samples is not None, "a stream has no end"
    bad: list[DataError] = []
    for i in some_samples(source, _LOOK_UPS):
        try:
            decode_image(source.read(i).image)
        except (SampleError, ImageError) as error:
            bad.append(error)
        else:
            return
    _report_bad(bad, len(bad))


@torch.inference_mode()
def classify_files(
    model: ImageClassifier,
    image_size: int,
    images: Sequence[Path],
    top: int,
    batch_size: int = BATCH_SIZE,
    max_bad: float | None = None,
) -> list[Prediction]:
    """Return the `top` best classes of image files, and of the images in folders and shards.

    Args:
        model: in evaluation mode.
        image_size: of the model, px.
        images: files, folders, shards, or folders of shards.
        top: number of classes to return for each image.
        batch_size: images that are classified together.
        max_bad: fraction of the images that may be rejected; None allows none of the files that are named, and of the
            images in folders and shards one, or one in a hundred.

    Raises:
        UsageError: a folder holds no image.
        DataError: more images than allowed cannot be read; it names the first.
    """
    refuse_zero(batch_size=batch_size, top=top)
    found, num_usual = _find_images(images)
    predictions: list[Prediction] = []
    bad: list[DataError] = []
    starts = range(0, len(found), batch_size)
    for start in track(starts, total=len(starts), label="classifying, batches"):
        part, pixels = [], []
        for name, read in found[start : start + batch_size]:
            try:
                pixels.append(eval_pixels(read(), image_size))
                part.append(name)
            except DataError as error:
                bad.append(error)
        if not part:
            continue
        best = _logits(model, pixels).softmax(dim=-1).topk(min(top, len(model.class_names)))
        for name, row, probabilities in zip(part, best.indices.tolist(), best.values.tolist(), strict=True):
            names = [model.class_names[i] for i in row]
            classes = [{"name": each, "probability": p} for each, p in zip(names, probabilities, strict=True)]
            predictions.append(Prediction(name, classes))
    usual = max(1.0, _MAX_BAD * num_usual) if num_usual else 0.0
    _refuse_bad(bad, len(found), usual if max_bad is None else max_bad * len(found))
    return predictions


def as_row(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as a row of a table: image, class_1, probability_1, class_2, ..."""
    row: dict[str, Any] = {"image": prediction.image}
    for number, entry in enumerate(prediction.classes, start=1):
        row |= {f"class_{number}": entry["name"], f"probability_{number}": entry["probability"]}
    return row


def _find_images(paths: Sequence[Path]) -> tuple[list[tuple[str, Callable[[], Image.Image]]], int]:
    """Return name and reader of the images, and how many of them are in folders and shards."""
    found: list[tuple[str, Callable[[], Image.Image]]] = []
    num_named = 0
    for path in paths:
        if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
            shards = IndexedShards(expand_shards(str(path)), require_caption=False)
            found += [(shards.key(i), partial(_read_sample, shards, i)) for i in range(len(shards))]
        elif path.is_dir():
            files, skipped = list_images(path)
            if not files:
                raise UsageError("the folder holds no image", where=str(path), note=skipped, hint="give another folder")
            if skipped:
                logger.warning("%s: %s", path, skipped)
            found += [(store_name(str(file)), partial(read_image, file)) for file in files]
        else:
            found.append((store_name(str(path)), partial(read_image, path)))
            num_named += 1
    return found, len(found) - num_named


def _read_sample(shards: IndexedShards, i: int) -> Image.Image:
    return decode_image(shards.read(i).image, where=shards.key(i))


def _refuse_bad(bad: Sequence[DataError], num_files: int, allowed: float) -> None:
    for error in bad[:_SHOWN] if 0 < len(bad) <= allowed else ():
        logger.warning("skipped %s: %s", error.where, error.what)
    if len(bad) <= allowed and len(bad) < num_files:
        if len(bad) > _SHOWN:
            logger.warning("skipped %d more images", len(bad) - _SHOWN)
        return
    if num_files == 1:
        raise bad[0]
    what = f"{len(bad)} of {num_files} images cannot be classified; the first: {bad[0].what}"
    hint = f"check the images; or accept the loss: the same command with --max-bad {len(bad) / num_files + 0.0005:.3f}"
    raise DataError(what, where=bad[0].where, hint=hint)


def _class_of(label: Label | None, classes: Mapping[Label, int], key: str) -> int:
    if label is not None and label in classes:
        return classes[label]
    last = max(number for number in classes if isinstance(number, int))
    raise DataError(
        f"label {label!r} has no class name",
        where=key,
        hint=f"labels are names, or go from 0 to {last}; pass the class-name file that belongs to the shards",
    )


def _logits(model: ImageClassifier, pixels: Sequence[Pixels]) -> Float[Tensor, "B C"]:
    device = next(model.parameters()).device
    return model(torch.from_numpy(np.stack(pixels)).to(device)).logits.float()


def _report_bad(bad: Sequence[DataError], num_samples: int) -> None:
    if not bad:
        return
    what = f"{len(bad)} of {num_samples} samples cannot be classified; the first: {bad[0].what}"
    if len(bad) == num_samples:
        raise DataError(what, where=bad[0].where, hint="check the data; for shards: mmvit-data check SHARDS")
    logger.warning("%s (%s); they are excluded from the accuracy", what, bad[0].where)
