"""The softmax contrastive loss of CLIP over the global batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmvit.losses.gather import gather_rows, world


def contrastive_loss(
    image: Float[Tensor, "b E"],
    text: Float[Tensor, "b E"],
    logit_scale: Float[Tensor, ""],
    groups: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy over image-text cosines (Radford et al. 2021, figure 3).

    Takes this process's unit-length rows; the negatives are the rows of all processes. Each process scores its own
    rows only, and the mean of the processes' values is the loss of the whole batch. Logits are float32 even under
    autocast. Rows with equal `groups` (say, with the same caption) count as positives of one another in equal
    parts, so that a caption that stands twice in a batch is not its own negative.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = image.float(), text.float()
        all_image, all_text = gather_rows(image), gather_rows(text)
        image_logits = logit_scale * image @ all_text.T  # [b, B]
        text_logits = logit_scale * text @ all_image.T  # [b, B]
        targets = _diagonal(image) if groups is None else _shares(groups)
        return (F.cross_entropy(image_logits, targets) + F.cross_entropy(text_logits, targets)) / 2


def _diagonal(rows: Tensor) -> Int[Tensor, " b"]:
    """Column of each local row's own partner."""
    return torch.arange(len(rows), device=rows.device) + world()[0] * len(rows)


def _shares(groups: Int[Tensor, " b"]) -> Float[Tensor, "b B"]:
    """Target probabilities: equal shares over the columns of the row's own group."""
    same = (groups[:, None] == gather_rows(groups)[None, :]).float()
    return same / same.sum(dim=1, keepdim=True)
