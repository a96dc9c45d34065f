"""The softmax contrastive loss of CLIP over the global batch."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmvit.losses.gather import logsumexp_over_ranks
from mmvit.losses.pairs import Layout, Pairs, Tile, differentiable


def contrastive_loss(
    image: Float[Tensor, "m E"],
    text: Float[Tensor, "n E"],
    logit_scale: Float[Tensor, ""],
    image_groups: Int[Tensor, " m"] | None = None,
    text_groups: Int[Tensor, " n"] | None = None,
    *,
    layout: Layout = "auto",
) -> Float[Tensor, ""]:
    """Return the symmetric cross-entropy over image-text cosines (Radford et al. 2021, figure 3).

    The negatives are the rows of all ranks. Logits are float32 even under autocast.

    Args:
        image: Unit-length image embeddings of this rank.
        text: Unit-length text embeddings of this rank; without groups, row i is paired with row i.
        logit_scale: Factor that multiplies the cosines.
        image_groups: Rows of the same group are positives of each other with equal weight, so that an image can have
            several captions, and a caption that occurs twice in the batch is not its own negative. Each group needs
            both an image and a text in the global batch.
        text_groups: Groups of the texts; default: those of the images.
        layout: How the pairs are computed (see `pairs`); the result is the same.
    """

    def compute(needed: bool, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
        return _softmax(Pairs(image, text, scale, image_groups, text_groups, layout=layout), needed)

    return differentiable(compute, image, text, logit_scale)


def _softmax(pairs: Pairs, needed: bool) -> tuple[Tensor, list[Tensor]]:
    # sum_i -log softmax of row i's targets = log-normaliser of row i - the targets' logits; likewise for columns.
    targets, positives = _target_weights(pairs), torch.zeros_like(pairs.logit_scale)

    def add_positives(tile: Tile) -> None:
        if tile.positive is not None:
            positives.add_((tile.logits * tile.positive * targets[tile.rows, None]).sum())

    rows, columns = log_normalisers(pairs, add_positives)
    value = (rows.mean() + columns.mean()) / 2 - positives
    if not needed:
        return value, []
    add_log_weights(pairs, rows, columns)

    def slope(tile: Tile) -> Tensor:
        by_row = torch.sub(tile.logits, rows[tile.rows, None], out=tile.space).exp_()
        slopes = by_row.add_(tile.logits.sub_(columns[tile.columns]).exp_())
        return slopes if tile.positive is None else slopes.sub_(tile.positive * targets[tile.rows, None])

    return value, pairs.gradients(slope, columns)


def _target_weights(pairs: Pairs) -> Float[Tensor, " m"]:
    """Return the weight of each positive of a row: its weight in the row's target plus that in the column's."""
    num_texts = _count(pairs.image_groups, pairs.all_text_groups)
    num_images = _count(pairs.image_groups, pairs.all_image_groups)
    return 0.5 / (len(pairs.image) * num_texts) + 0.5 / (pairs.num_texts * num_images)


def _count(groups: Int[Tensor, " m"], among: Int[Tensor, " N"]) -> Int[Tensor, " m"]:
    among, groups = among.sort().values, groups.contiguous()
    return torch.searchsorted(among, groups, right=True) - torch.searchsorted(among, groups)


def log_normalisers(pairs: Pairs, visit: Callable[[Tile], None] | None = None) -> tuple[Tensor, Tensor]:
    """Return log(sum(exp(logits))) of this rank's images and of the held texts, over all pairs of the global batch."""
    rows = pairs.image.new_full((len(pairs.image),), -math.inf)
    columns = pairs.text.new_full((len(pairs.text),), -math.inf)
    for tile in pairs.walk(columns):
        for sums, dim in ((rows[tile.rows], 1), (columns[tile.columns], 0)):
            top = tile.logits.amax(dim, keepdim=True)  # so that exp neither overflows nor underflows
            total = torch.sub(tile.logits, top, out=tile.space).exp_().sum(dim).log_()
            torch.logaddexp(sums, total.add_(top.squeeze(dim)), out=sums)
        if visit is not None:
            visit(tile)
    return rows, logsumexp_over_ranks(columns) if pairs.adds_over_ranks else columns


def add_log_weights(pairs: Pairs, rows: Tensor, columns: Tensor) -> None:
    """Add the loss weights to the normalisers, so that exp(logit - normaliser) is a probability times its weight."""
    rows.add_(math.log(2 * len(pairs.image)))
    columns.add_(math.log(2 * pairs.num_texts))
