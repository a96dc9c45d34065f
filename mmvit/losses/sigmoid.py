"""The pairwise sigmoid loss of SigLIP over the global batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmvit.losses.pairs import Layout, Pairs, Tile, differentiable


def sigmoid_loss(
    image: Float[Tensor, "m E"],
    text: Float[Tensor, "n E"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    image_groups: Int[Tensor, " m"] | None = None,
    text_groups: Int[Tensor, " n"] | None = None,
    *,
    layout: Layout = "auto",
) -> Float[Tensor, ""]:
    """Return the sum over pairs of -log sigmoid(+-(scale * cosine + bias)), per image (Zhai et al. 2023, section 3.2).

    The sign is + for positives: rows of the same group, or without groups row i with row i. Takes the unit-length
    rows of this rank and pairs them with those of all ranks, as `contrastive_loss` does. No normaliser is needed, so
    value and gradients are computed in one pass over the pairs.
    """

    def compute(needed: bool, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
        return _sigmoid(Pairs(image, text, scale, image_groups, text_groups, layout=layout), bias, needed)

    return differentiable(compute, image, text, logit_scale, logit_bias)


def _sigmoid(pairs: Pairs, bias: Tensor, needed: bool) -> tuple[Tensor, list[Tensor]]:
    # -log sigmoid(-x) = softplus(x), whose derivative is sigmoid(x). Positives are negated before and after:
    # softplus(x) - x and sigmoid(x) - 1 would cancel in float32 once the loss is small.
    value, bias_grad = torch.zeros_like(bias), torch.zeros_like(bias)

    def slope(tile: Tile) -> Tensor:
        logits = tile.logits.add_(bias)
        sign = None if tile.positive is None else 1 - 2 * tile.positive.to(logits.dtype)
        if sign is not None:
            logits.mul_(sign)
        value.add_(F.softplus(logits).sum())
        slopes = torch.sigmoid(logits, out=tile.space)
        if sign is not None:
            slopes.mul_(sign)
        bias_grad.add_(slopes.sum() / len(pairs.image))
        return slopes.div_(len(pairs.image))

    gradients = []
    if needed:
        gradients = [*pairs.gradients(slope), bias_grad]
    else:
        for tile in pairs.walk():
            slope(tile)
    return value / len(pairs.image), gradients
