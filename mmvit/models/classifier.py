"""The image classifier for supervised and zero-shot classification."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.models.config import ClassifierConfig as ClassifierConfig
from mmvit.models.pixels import PixelNorm
from mmvit.towers.contract import Tower


class ClassLogits(NamedTuple):
    """Logits of the class head, and those of the distillation head if there is one."""

    by_class: Float[Tensor, "B C"]
    by_token: Float[Tensor, "B C"] | None = None

    @property
    def logits(self) -> Float[Tensor, "B C"]:
        """Return the logits to predict from: the mean of two heads (DeiT, Touvron et al. 2021, section 4)."""
        return self.by_class if self.by_token is None else (self.by_class + self.by_token) / 2


class HiddenHead(nn.Module):
    """Linear, tanh, linear: the head of ViT's pre-training (Dosovitskiy et al. 2021, section 3.1).

    The last layer starts at zero, as in the released code.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = zero_head(width, num_classes)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """Return the class logits."""
        return self.out(self.hidden(x).tanh())


class ImageClassifier(nn.Module):
    """An image tower and a head on its pooled vector.

    With an `image_projection` the head's input is unit-length embeddings, so that its weights can be text embeddings;
    nothing else differs between supervised and zero-shot classification. A tower with a distillation token has a head
    for it too.
    """

    def __init__(
        self,
        image_tower: Tower,
        pixel_norm: PixelNorm,
        head: nn.Module,
        class_names: Sequence[str],
        *,
        image_projection: nn.Module | None = None,
        distillation_head: nn.Linear | None = None,
    ):
        super().__init__()
        self.image_tower = image_tower
        self.pixel_norm = pixel_norm
        self.image_projection = image_projection
        self.head = head
        self.distillation_head = distillation_head
        self.class_names = list(class_names)

    def forward(self, images: Tensor, keep: Int[Tensor, "B K"] | None = None) -> ClassLogits:
        """Return class logits of images [B, 3, H, W], uint8 or normalised floats; `keep` as for the tower."""
        output = self.image_tower(self.pixel_norm(images), keep)
        features = output.pooled
        if self.image_projection is not None:
            features = F.normalize(self.image_projection(features).float(), dim=-1)
        by_token = None if self.distillation_head is None else self.distillation_head(output.distilled)
        return ClassLogits(self.head(features), by_token)

    def reset_classifier(self, class_names: Sequence[str]) -> None:
        """Replace the head by a linear head of zeros for other classes (ViT, section 3.2), without a hidden layer."""
        self.class_names = list(class_names)
        first = next(self.head.parameters())
        self.head = zero_head(first.shape[1], len(class_names)).to(first.device)
        if self.distillation_head is not None:
            width = self.distillation_head.in_features
            self.distillation_head = zero_head(width, len(class_names)).to(first.device)


def zero_head(width: int, num_classes: int) -> nn.Linear:
    """Return a linear head initialised with zeros."""
    head = nn.Linear(width, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def zero_shot_head(weights: Float[Tensor, "C E"], logit_scale: float) -> nn.Linear:
    """Return a head whose rows are class embeddings times the logit scale (Radford et al. 2021, section 3.1.2)."""
    head = nn.Linear(weights.shape[1], weights.shape[0], bias=False, device=weights.device)
    head.weight.data.copy_(weights * logit_scale)
    return head.requires_grad_(False)
