"""The loss of supervised runs: cross-entropy with the labels, and with the predictions of a teacher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmvit.config import ClassLossConfig
from mmvit.losses.classification import classification_loss, hard_distillation_loss, soft_distillation_loss
from mmvit.models.classifier import ClassLogits
from mmvit.train.contract import Part


class ClassTargets(NamedTuple):
    """The classes' shares in each image, and the teacher's logits."""

    shares: Float[Tensor, "b C"]
    teacher: Float[Tensor, "b C"] | None


class ClassObjective:
    """The loss of images and their classes."""

    compares = False

    def __init__(self, config: ClassLossConfig):
        self.config = config

    def totals(self, parts: Sequence[Part]) -> int:
        """Return the number of images of this rank."""
        return sum(len(part.targets.shares) for part in parts)

    def between(self, rows: ClassLogits, targets: ClassTargets) -> dict[str, Tensor]:
        """Return no losses: samples are not compared."""
        return {}

    def within(self, rows: ClassLogits, part: Part, totals: int) -> dict[str, Tensor]:
        """Return the loss; its values add up over the micro-batches of a step."""
        config, targets = self.config, part.targets
        if targets.teacher is None:  # a distilled model trained without a teacher: both heads learn the labels
            heads = [logits for logits in (rows.by_class, rows.by_token) if logits is not None]
            losses = [classification_loss(logits, targets.shares, totals) for logits in heads]
            return {"classification": torch.stack(losses).mean()}
        arguments = (rows.by_class, targets.shares, targets.teacher, totals)
        if config.distillation == "hard":
            loss = hard_distillation_loss(*arguments, token_logits=rows.by_token, weight=config.weight)
        else:
            loss = soft_distillation_loss(
                *arguments,
                token_logits=rows.by_token,
                weight=config.weight,
                temperature=config.temperature,
                reduction=config.reduction,
            )
        return {"distillation": loss}
