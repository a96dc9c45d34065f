"""The softmax contrastive loss of CLIP over the global batch."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmvit.losses.gather import logsumexp_over_ranks
from mmvit.losses.pairs import Layout, Pairs, Tile, differentiable

_LEFT_OUT = -1e30  # the logit of a pair that is no negative; -inf would give nan where a tile has no negative


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

    Row i is paired with row i, or with V texts an image with the rows V i to V i + V - 1, all of which then are its
    targets with equal weight (L_out of Khosla et al. 2020, equation 2). The negatives are the rows of all ranks.
    Logits are float32 even under autocast.

    Pairs of equal groups are no negatives: they are left out of the denominators (false negative elimination, Huynh
    et al. 2022). Where the texts of a group are equal, as equal captions are, this is the loss in which all of the
    group are positives and none is a negative (SINCERE, Feeney and Hughes 2023, figure 1).

    With N the log-sum-exp over the negatives and s the logit of a pair, a term is softplus(N - s), and the derivative
    by s is -sigmoid(N - s): unlike log-sum-exp(all) - s and p - 1, these keep their digits however small the loss is.

    Args:
        image: Unit-length image embeddings of this rank.
        text: Unit-length text embeddings of this rank.
        logit_scale: Factor that multiplies the cosines.
        image_groups: Equal for images whose texts count as equal; default: all differ. The groups of several texts
            an image must be passed.
        text_groups: Groups of the texts, each that of its image; default: those of the images.
        layout: How the pairs are computed (see `pairs`); the result is the same.

    Raises:
        ValueError: the rows are not paired, or a text is of another group than its image.
    """
    if image_groups is not None and text_groups is not None and text_groups is not image_groups:
        _check_pairing(image_groups, text_groups)

    def compute(needed: bool, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
        return _softmax(Pairs(image, text, scale, image_groups, text_groups, layout=layout), image, text, needed)

    return differentiable(compute, image, text, logit_scale)


def _check_pairing(image_groups: Tensor, text_groups: Tensor) -> None:
    num_own, rest = divmod(len(text_groups), len(image_groups))
    if rest or not torch.equal(image_groups.repeat_interleave(num_own), text_groups):
        raise ValueError(
            f"{len(text_groups)} texts of {len(image_groups)} images: the texts of an image must be next to each "
            "other, as many for each image, in the order of the images and of the same group"
        )


def _softmax(pairs: Pairs, image: Tensor, text: Tensor, needed: bool) -> tuple[Tensor, list[Tensor]]:
    num_images, num_texts = len(image), len(text)
    texts = text.unflatten(0, (num_images, -1))  # [m, V, E]
    cosines = torch.bmm(image[:, None], texts.transpose(1, 2))[:, 0]  # [m, V], of the pairs of this rank
    own = cosines * pairs.logit_scale
    of_image = own.logsumexp(dim=1)
    rows, columns = log_normalisers(pairs, negatives_only=True)
    row_gap = pairs.own_images(rows) - of_image
    column_gap = pairs.own_texts(columns).view_as(own) - own
    value = (F.softplus(row_gap) + (of_image - own.mean(dim=1))).mean() / 2 + F.softplus(column_gap).mean() / 2
    if not needed:
        return value, []
    rows = torch.logaddexp(rows, pairs.of_held_images(of_image))
    columns = torch.logaddexp(columns, pairs.of_held_texts(own.flatten()))
    add_log_weights(pairs, rows, columns)

    def slope(tile: Tile) -> Tensor:
        logits = _negatives(tile)
        by_row = torch.sub(logits, rows[tile.rows, None], out=tile.space).exp_()
        return by_row.add_(logits.sub_(columns[tile.columns]).exp_())

    image_grad, text_grad, scale_grad = pairs.gradients(slope, columns)
    share = (own - of_image[:, None]).exp_()  # of each text in those of its image: 1 if there is one
    slopes = ((share - 1 / own.shape[1]) - share * row_gap.sigmoid()[:, None]) / (2 * num_images)
    slopes -= column_gap.sigmoid() / (2 * num_texts)
    scaled = slopes * pairs.logit_scale
    for i, partners in enumerate(texts.unbind(dim=1)):
        image_grad.addcmul_(scaled[:, i, None], partners)
        text_grad.view_as(texts)[:, i].addcmul_(scaled[:, i, None], image)
    return value, [image_grad, text_grad, scale_grad + (slopes * cosines).sum()]


def _negatives(tile: Tile) -> Tensor:
    """Return the logits of a tile without those of equal groups."""
    return tile.logits if tile.positive is None else tile.logits.masked_fill_(tile.positive, _LEFT_OUT)


def log_normalisers(pairs: Pairs, *, negatives_only: bool = False) -> tuple[Tensor, Tensor]:
    """Return log(sum(exp(logits))) of the held images and texts, over all pairs of the global batch or the negatives.

    Where there is no negative, it is about -1e30.
    """
    rows = pairs.image.new_full((len(pairs.image),), -math.inf)
    columns = pairs.text.new_full((len(pairs.text),), -math.inf)
    for tile in pairs.walk(columns):
        logits = _negatives(tile) if negatives_only else tile.logits
        for sums, dim in ((rows[tile.rows], 1), (columns[tile.columns], 0)):
            top = logits.amax(dim, keepdim=True)  # so that exp neither overflows nor underflows
            total = torch.sub(logits, top, out=tile.space).exp_().sum(dim).log_()
            torch.logaddexp(sums, total.add_(top.squeeze(dim)), out=sums)
    return rows, logsumexp_over_ranks(columns) if pairs.adds_over_ranks else columns


def add_log_weights(pairs: Pairs, rows: Tensor, columns: Tensor) -> None:
    """Add the loss weights to the normalisers, so that exp(logit - normaliser) is a probability times its weight."""
    rows.add_(math.log(2 * len(pairs.image)))
    columns.add_(math.log(2 * pairs.num_texts))
