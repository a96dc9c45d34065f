"""Supervised classification of pictures: accuracy on labelled ones, the best classes of others."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from data_tools.core.errors import DataError, SampleError
from data_tools.sample.decode import ImageError, decode_image, read_image
from mmvit.checkpoint import LoadedClassifier
from mmvit.data.labels import Labelled
from mmvit.data.transforms import Pixels, eval_pixels
from mmvit.eval.zero_shot import Prediction, best_classes
from mmvit.models.classifier import ImageClassifier

logger = logging.getLogger(__name__)

BATCH_SIZE = 256


class Accuracy(NamedTuple):
    """Shares in [0, 1] of the images whose class is the best one, or among the best five."""

    acc1: float
    acc5: float
    labels: Int[Tensor, " M"]
    found: Int[Tensor, " M"]
    num_bad: int  # samples that cannot be used and are left out


@torch.inference_mode()
def evaluate_classifier(
    model: ImageClassifier,
    data: Labelled,
    image_size: int,
    limit: int | None = None,
    before_each_batch: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Measure accuracy on labelled pictures, all or `limit` of them, evenly spread.

    `before_each_batch` may raise to end it.

    Raises:
        DataError: none of them can be used.
    """
    limit = len(data.samples) if limit is None else min(limit, len(data.samples))
    chosen = torch.linspace(0, len(data.samples) - 1, limit, dtype=torch.float64).long().tolist()
    labels: list[int] = []
    best, bad = [], []
    for start in range(0, limit, BATCH_SIZE):
        before_each_batch()
        pixels = []
        for sample_id in chosen[start : start + BATCH_SIZE]:
            try:
                sample = data.samples.read(sample_id)
                pixels.append(eval_pixels(decode_image(sample.image, where=sample.key), image_size))
            except (SampleError, ImageError) as error:
                bad.append(error)
                continue
            assert isinstance(sample.label, int)
            labels.append(sample.label)
        if pixels:
            best.append(_logits(model, pixels).topk(min(5, len(data.class_names))).indices.cpu())
    if bad:
        logger.warning("%d of %d samples cannot be classified; the first: %s", len(bad), limit, bad[0])
    if not best:
        raise DataError("no sample can be classified", where=bad[0].where if bad else None)
    target, found = torch.tensor(labels), torch.cat(best)
    hits = found == target[:, None]
    return Accuracy(
        hits[:, 0].float().mean().item(), hits.any(dim=1).float().mean().item(), target, found[:, 0], len(bad)
    )


@torch.inference_mode()
def classify_pictures(loaded: LoadedClassifier, images: Sequence[Path], top: int) -> list[Prediction]:
    """Return the best classes of picture files; raises DataError naming the first that cannot be read."""
    size = loaded.config.image.image_size
    predictions = []
    for start in range(0, len(images), BATCH_SIZE):
        part = images[start : start + BATCH_SIZE]
        logits = _logits(loaded.model, [eval_pixels(read_image(image), size) for image in part])
        predictions += best_classes(part, logits, loaded.model.class_names, top)
    return predictions


def _logits(model: ImageClassifier, pixels: Sequence[Pixels]) -> Tensor:
    device = next(model.parameters()).device
    return model(torch.from_numpy(np.stack(pixels)).to(device)).logits.float()
