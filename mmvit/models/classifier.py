"""The image classifier, which supervised and zero-shot classification share."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from mmvit.models.dual_encoder import DualEncoder


class ImageClassifier(nn.Module):
    """Image features times a linear head: logits [B, C] for the named classes.

    `features` maps images to vectors [B, D]: a tower with its pooling, or `ImageEmbedder` below, whose head is then
    made of text embeddings. Nothing else differs between the two kinds of classification.
    """

    def __init__(self, features: nn.Module, head: nn.Linear, class_names: Sequence[str]):
        super().__init__()
        if head.out_features != len(class_names):
            raise ValueError(f"the head has {head.out_features} rows for {len(class_names)} class names")
        self.features = features
        self.head = head
        self.class_names = list(class_names)

    def forward(self, images: Tensor) -> Float[Tensor, "B C"]:
        """Score images [B, 3, H, W] against each class."""
        return self.head(self.features(images))


class ImageEmbedder(nn.Module):
    """The image side of a dual encoder as a feature extractor with unit-length vectors."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Float[Tensor, "B E"]:
        """Encode images."""
        return self.model.encode_image(images)


def zero_shot_head(weights: Float[Tensor, "C E"], logit_scale: float) -> nn.Linear:
    """Make the head whose rows are class embeddings times the logit scale (Radford et al. 2021, section 3.1.2)."""
    head = nn.Linear(weights.shape[1], weights.shape[0], bias=False, device=weights.device)
    head.weight.data.copy_(weights * logit_scale)
    return head.requires_grad_(False)
