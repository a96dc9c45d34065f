"""Held-out pairs: the contrastive loss, and how often an image finds its caption and a caption its image."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_tools.core.errors import DataError, SampleError
from data_tools.sample.content import FaultError
from data_tools.sample.decode import ImageError, decode_image
from mmvit.data.captions import CaptionConfig, caption_texts
from mmvit.data.prompts import fill
from mmvit.data.source import SampleSource, some_samples
from mmvit.data.transforms import Pixels
from mmvit.eval.encoder import Encoder

LOSS_BATCH = 256  # pairs that are compared for the loss, whatever the batch of the run: losses of runs are comparable
_LOOK_UPS = 50  # samples that are read before a run


class PairScores(NamedTuple):
    """What is measured on held-out pairs; R@k is the fraction of queries with a match among the k nearest.

    Attributes:
        loss: softmax contrastive loss over batches of `LOSS_BATCH` pairs, with the logit scale of the model.
        image_to_text: R@1 and R@5 of images that search for their caption among the different captions.
        text_to_image: R@1 and R@5 of captions that search for an image with this caption.
        num_bad: samples that are left out.
    """

    loss: float
    image_to_text: tuple[float, float]
    text_to_image: tuple[float, float]
    num_bad: int


def evaluate_pairs(
    encoder: Encoder,
    source: SampleSource,
    samples: Sequence[int],
    caption: CaptionConfig,
    before_each_batch: Callable[[], None] = lambda: None,
) -> PairScores:
    """Measure the pairs of some samples; each has the first text of `caption`, in its first template.

    Raises:
        DataError: none of the samples can be used.
    """
    images, texts, captions, bad = list[Tensor](), list[Tensor](), list[str](), 0
    for start in range(0, len(samples), LOSS_BATCH):
        before_each_batch()
        pixels, found = list[Pixels](), list[str]()
        for i in samples[start : start + LOSS_BATCH]:
            try:
                text, image = _pair(encoder, source, i, caption)
            except (SampleError, FaultError, ImageError) as error:
                bad, last = bad + 1, error
                continue
            pixels.append(image)
            found.append(text)
        if found:
            images.append(encoder.encode_pixels(pixels))
            texts.append(encoder.encode_text(found))
            captions += found
    if not captions:
        raise DataError(f"none of {len(samples)} held-out pairs can be used: {last}", where="validation.data")
    return pair_scores(torch.cat(images), torch.cat(texts), _groups(captions), encoder.logit_scale, bad)


def check_pairs(source: SampleSource, caption: CaptionConfig) -> None:
    """Raise DataError if none of some samples has a caption; one that has is enough."""
    for i in some_samples(source, _LOOK_UPS):
        try:
            caption_texts(source.read(i), caption)
        except (SampleError, FaultError) as error:
            last = error
        else:
            return
    raise DataError(f"no held-out pair that was read has a caption: {last}", where="validation.data")


def pair_scores(
    images: Float[Tensor, "M E"],
    texts: Float[Tensor, "M E"],
    groups: Int[Tensor, " M"],
    logit_scale: float,
    num_bad: int = 0,
) -> PairScores:
    """Score unit-length embeddings of pairs; pairs of equal groups have the same caption.

    Ties count as misses, so that a model that gives all inputs the same output finds nothing.
    """
    whole = [range(start, start + LOSS_BATCH) for start in range(0, len(images) - LOSS_BATCH + 1, LOSS_BATCH)]
    parts = whole or [range(len(images))]
    losses = [_loss(images[part], texts[part], groups[part], logit_scale) for part in map(list, parts)]
    first = torch.tensor([int((groups == group).nonzero()[0]) for group in groups.unique()])  # of each caption
    to_text = _recalls(images, texts[first], groups, groups[first])
    to_image = _recalls(texts[first], images, groups[first], groups)
    return PairScores(sum(losses) / len(losses), to_text, to_image, num_bad)


def _pair(encoder: Encoder, source: SampleSource, i: int, caption: CaptionConfig) -> tuple[str, Pixels]:
    sample = source.read(i)
    text = caption_texts(sample, caption)[0].text
    text = fill(caption.templates[0], text) if caption.templates else text
    return text, encoder.preprocess(decode_image(sample.image))


def _groups(captions: Sequence[str]) -> Int[Tensor, " M"]:
    numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[text] for text in captions])


def _loss(image: Tensor, text: Tensor, groups: Tensor, logit_scale: float) -> float:
    """Return the mean of both directions' cross-entropy; equal captions of other pairs are no negatives."""
    logits = logit_scale * image @ text.T
    other = (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool)
    logits = logits.masked_fill(other, float("-inf"))
    return -0.5 * (logits.log_softmax(dim=0).diagonal() + logits.log_softmax(dim=1).diagonal()).mean().item()


def _recalls(queries: Tensor, keys: Tensor, query_groups: Tensor, key_groups: Tensor) -> tuple[float, float]:
    """Return R@1 and R@5: a query hits where fewer than k keys of other groups score as high as its best match."""
    better = []
    for start in range(0, len(queries), LOSS_BATCH):
        scores = queries[start : start + LOSS_BATCH] @ keys.T
        same = query_groups[start : start + LOSS_BATCH, None] == key_groups
        best = scores.masked_fill(~same, float("-inf")).amax(dim=1, keepdim=True)
        better.append(((scores >= best) & ~same).sum(dim=1))
    ranks = torch.cat(better)
    return (ranks < 1).float().mean().item(), (ranks < 5).float().mean().item()
