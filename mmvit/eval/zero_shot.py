"""Zero-shot classification: a classifier made of class names and templates."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from data_tools.core.errors import DataError, SampleError
from data_tools.sample.content import Label
from data_tools.sample.decode import ImageError, decode_image
from mmvit.data.prompts import fill
from mmvit.data.shards import IndexedShards
from mmvit.eval.encoder import Encoder, refuse_str
from mmvit.models.classifier import ImageClassifier, zero_shot_head

logger = logging.getLogger(__name__)


class ZeroShotResult(NamedTuple):
    """Accuracies in [0, 1] and the best classes of each image, best first; `samples` are the images' numbers."""

    acc1: float
    acc5: float
    labels: Int[Tensor, " M"]
    best: Int[Tensor, "M k"]
    samples: Int[Tensor, " M"]
    num_bad: int  # samples that cannot be used and are left out


class Prediction(NamedTuple):
    """The best classes of one image, each {"name", "probability"}, best first."""

    image: str
    classes: list[dict[str, Any]]


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "C E"]:
    """Average each class's unit text embeddings over the templates and renormalise (Radford et al. 2021, 3.1.4)."""
    refuse_str(names, "class names")
    refuse_str(templates, "templates")
    prompts = [fill(template, name) for name in names for template in templates]
    rows = encoder.encode_text(prompts).unflatten(0, (len(names), len(templates)))  # [C, K, E]
    return F.normalize(rows.mean(dim=1), dim=-1)


def zero_shot_classifier(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> ImageClassifier:
    """Make the image classifier whose head is the class embeddings times the logit scale."""
    weights = class_embeddings(encoder, names, templates).to(encoder.device)
    model, head = encoder.model, zero_shot_head(weights, encoder.logit_scale)
    return ImageClassifier(model.image_tower, model.pixel_norm, head, names, image_projection=model.image_projection)


def classify_images(
    encoder: Encoder, images: Sequence[Path], names: Sequence[str], templates: Sequence[str], top: int
) -> list[Prediction]:
    """Classify picture files; raises DataError naming the first that cannot be read."""
    classifier = zero_shot_classifier(encoder, names, templates).eval()
    predictions = []
    for start in range(0, len(images), encoder.batch_size):
        part = images[start : start + encoder.batch_size]
        with torch.inference_mode():
            predictions += best_classes(part, classifier(encoder.pixels(part)).logits, names, top)
    return predictions


def best_classes(
    images: Sequence[Path], logits: Float[Tensor, "B C"], names: Sequence[str], top: int
) -> list[Prediction]:
    """Return the `top` best classes of each image with their probabilities."""
    best = logits.softmax(dim=-1).topk(min(top, len(names)))
    predictions = []
    for image, row, probabilities in zip(images, best.indices.tolist(), best.values.tolist(), strict=True):
        classes = [{"name": names[i], "probability": p} for i, p in zip(row, probabilities, strict=True)]
        predictions.append(Prediction(str(image), classes))
    return predictions


def evaluate_zero_shot(
    encoder: Encoder,
    shards: IndexedShards,
    names: Sequence[str],
    templates: Sequence[str],
    limit: int | None = None,
    before_each_batch: Callable[[], None] = lambda: None,
) -> ZeroShotResult:
    """Classify labelled samples, all or `limit` spread evenly over them; those that cannot be read are left out.

    Classes of equal name are one class: no classifier could tell them apart. `before_each_batch` may raise to end it.

    Raises:
        DataError: a sample has no label, or one beyond the class names; or no sample can be read.
    """
    if not len(shards):
        raise DataError("there is nothing to classify: the shards hold no sample")
    unique, class_of_label = _number_classes(names)
    limit = len(shards) if limit is None else min(limit, len(shards))
    chosen = torch.linspace(0, len(shards) - 1, limit, dtype=torch.float64).long().tolist()
    classes = class_embeddings(encoder, [names[i] for i in unique], templates)
    labels, best, samples = [], [], []
    bad: list[DataError] = []
    for start in range(0, len(chosen), encoder.batch_size):
        before_each_batch()
        pixels = []
        for sample_id in chosen[start : start + encoder.batch_size]:
            try:
                sample = shards.read(sample_id)
                picture = encoder.preprocess(decode_image(sample.image, where=sample.key))
            except (SampleError, ImageError) as error:
                bad.append(error)
                continue
            if sample.label is None or sample.label not in class_of_label:
                raise DataError(
                    f"label {sample.label!r} has no class name",
                    where=sample.key,
                    hint=f"labels go from 0 to {len(names) - 1}; give the class-name file that belongs to the shards",
                )
            labels.append(class_of_label[sample.label])
            pixels.append(picture)
            samples.append(sample_id)
        scores = encoder.encode_pixels(pixels) @ classes.T
        best.append(scores.topk(min(5, len(unique))).indices)
    _tell(bad, len(chosen))
    target, found = torch.tensor(labels), torch.cat(best)
    hits = found == target[:, None]
    return ZeroShotResult(
        hits[:, 0].float().mean().item(),
        hits.any(dim=1).float().mean().item(),
        torch.tensor(unique)[target],
        torch.tensor(unique)[found],
        torch.tensor(samples),
        len(bad),
    )


def _number_classes(names: Sequence[str]) -> tuple[list[int], dict[Label, int]]:
    """Return the first line of each distinct name, and for each label (a line or a name) its position among these."""
    lines: dict[str, int] = {}
    for line, name in enumerate(names):
        lines.setdefault(name.casefold(), line)
    position = {name: i for i, name in enumerate(lines)}
    class_of_label: dict[Label, int] = {line: position[name.casefold()] for line, name in enumerate(names)}
    return list(lines.values()), class_of_label | {name: position[name.casefold()] for name in names}


def _tell(bad: Sequence[DataError], num_samples: int) -> None:
    if not bad:
        return
    what = f"{len(bad)} of {num_samples} samples cannot be classified; the first: {bad[0].what}"
    if len(bad) == num_samples:
        raise DataError(what, where=bad[0].where, hint="look at the shards: mmvit-data check SHARDS")
    logger.warning("%s (%s); they are left out of the accuracy", what, bad[0].where)
