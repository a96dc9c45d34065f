"""The weighted losses of pretraining."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmvit.config import LossConfig
from mmvit.data.batches import Batch
from mmvit.data.tokenizers import Tokenizer
from mmvit.losses.contrastive import contrastive_loss
from mmvit.losses.distillation import distillation_loss
from mmvit.losses.gather import world
from mmvit.losses.masked import captioning_loss
from mmvit.losses.pairs import Layout
from mmvit.losses.sigmoid import sigmoid_loss
from mmvit.losses.token_classification import count_captions, token_classification_loss, token_weights
from mmvit.models.dual_encoder import Embeddings
from mmvit.train.contract import Part
from mmvit.train.runs.teacher import Teacher
from mmvit.train.safety.learning import Chance


class Targets(NamedTuple):
    """The targets of the rows of this rank."""

    groups: Int[Tensor, "b V"] | None  # equal where captions are
    teacher_image: Float[Tensor, "b T"] | None = None
    teacher_text: Float[Tensor, "b T"] | None = None


class Totals(NamedTuple):
    """The totals of a step by which per-sample losses are divided, so that micro-batches add up."""

    samples: int  # of this rank
    tokens: Tensor | None  # to predict, over all ranks, divided by the number of ranks
    token_weights: Float[Tensor, " vocab"] | None


class PretrainObjective:
    """The losses of images and their captions; an `Objective`."""

    compares = True

    def __init__(
        self, config: LossConfig, teacher: Teacher | None, *, same_caption_positives: bool, tokenizer: Tokenizer
    ):
        self.config = config
        self.teacher = teacher
        self.same_caption_positives = same_caption_positives
        self.end_of_text = tokenizer.end_of_text
        self.vocab_size = tokenizer.vocab_size
        frame = (tokenizer.start_of_text, tokenizer.end_of_text, tokenizer.pad)
        self.frame = [token for token in frame if token is not None]  # special tokens

    def between(self, rows: Embeddings, targets: Targets) -> dict[str, Tensor]:
        """Return the losses that compare samples, by name and weighted; `rows` are all rows of this rank."""
        groups, layout = targets.groups, self.config.layout
        views: list[tuple[Tensor, Tensor | None, Tensor | None]]
        if self.config.joint_captions:
            own = _own_groups(rows.image) if groups is None else groups[:, 0]
            views = [(rows.text.flatten(0, 1), own, own.repeat_interleave(rows.text.shape[1]))]
        else:
            columns = [None] * rows.text.shape[1] if groups is None else groups.unbind(dim=1)
            views = [(text, group, group) for text, group in zip(rows.text.unbind(dim=1), columns, strict=True)]
        losses = {"contrastive": torch.stack([self._contrastive(rows, *view, layout) for view in views]).mean()}
        if self.teacher is not None:
            assert targets.teacher_image is not None
            assert targets.teacher_text is not None
            losses["distillation"] = self.config.distillation * distillation_loss(
                rows.image,
                rows.text[:, 0],
                rows.logit_scale,
                targets.teacher_image,
                targets.teacher_text,
                self.teacher.logit_scale,
            )
        return losses

    def within(self, rows: Embeddings, part: Part, totals: Totals) -> dict[str, Tensor]:
        """Return the losses of single samples, by name and weighted; they add up over the micro-batches."""
        ids, losses = part.inputs[1], {}
        if totals.tokens is not None:
            assert rows.caption_logits is not None
            following = ids[:, 0, 1:]
            value = captioning_loss(rows.caption_logits, following, self._until_end(ids), totals.tokens)
            losses["captioning"] = self.config.captioning * value
        if totals.token_weights is not None:
            assert rows.token_logits is not None
            value = token_classification_loss(rows.token_logits, ids[:, 0], totals.token_weights, totals.samples)
            losses["token_classification"] = self.config.token_classification * value
        return losses

    def totals(self, parts: Sequence[Part]) -> Totals:
        """Count over all micro-batches of a step and all ranks."""
        ids = [part.inputs[1] for part in parts]
        samples = sum(len(part) for part in ids)
        tokens = weights = None
        if self.config.captioning:
            tokens = torch.stack([self._until_end(part).sum() for part in ids]).sum().float()
            if world()[1] > 1:
                dist.all_reduce(tokens)
            tokens = tokens / world()[1]
        if self.config.token_classification:
            counts = torch.stack([count_captions(part[:, 0], self.vocab_size) for part in ids]).sum(dim=0)
            weights = token_weights(counts, samples * world()[1], self.frame)
        return Totals(samples, tokens, weights)

    def targets(self, batch: Batch, device: torch.device) -> Targets:
        """Return the targets of a micro-batch on the device, with the embeddings of the teacher."""
        groups = batch.groups.to(device, non_blocking=True) if self.same_caption_positives else None
        if self.teacher is None:
            return Targets(groups)
        return Targets(groups, *self.teacher.rows(batch, device))

    def _contrastive(
        self, rows: Embeddings, text: Tensor, image_groups: Tensor | None, text_groups: Tensor | None, layout: Layout
    ) -> Tensor:
        scale, bias = rows.logit_scale, rows.logit_bias
        if bias is None:
            return contrastive_loss(rows.image, text, scale, image_groups, text_groups, layout=layout)
        return sigmoid_loss(rows.image, text, scale, bias, image_groups, text_groups, layout=layout)

    def _until_end(self, ids: Int[Tensor, "b V L"]) -> Bool[Tensor, "b M"]:
        """Return which of the tokens after the first belong to the first caption, its end included."""
        ended = (ids[:, 0] == self.end_of_text).cumsum(dim=1)  # from the end on at least 1
        return ended[:, :-1] == 0


def chance(config: LossConfig, batch_size: int, num_captions: int) -> Chance:
    """Return the contrastive loss of embeddings that are all equal, with the best logit bias."""
    if config.kind == "sigmoid":  # each pair has the probability 1 / B
        value = math.log(batch_size) + (batch_size - 1) * -math.log1p(-1 / batch_size)
        return Chance("contrastive", value, "ln(batch) + 1")
    joint = math.log(num_captions) / 2 if config.joint_captions else 0.0  # of one of the two directions
    return Chance("contrastive", math.log(batch_size) + joint, "ln(batch)")


def _own_groups(image: Float[Tensor, "b E"]) -> Int[Tensor, " b"]:
    """Return a number for each image, unique over all ranks."""
    return torch.arange(len(image), device=image.device) + world()[0] * len(image)
