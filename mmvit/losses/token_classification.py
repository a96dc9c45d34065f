"""Token classification: the tokens of an image's caption are its classes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmvit.losses.gather import world


def token_classification_loss(
    logits: Float[Tensor, "b V"], ids: Int[Tensor, "b L"], weights: Float[Tensor, " V"], count: float | int | Tensor
) -> Float[Tensor, ""]:
    """Return the softmax cross-entropy with a caption's distinct tokens as weighted targets.

    SuperClass, Huang et al. 2024. A caption whose tokens all have weight 0 contributes nothing.

    Args:
        logits: One per token of the vocabulary, predicted from the image.
        ids: Token ids of the captions.
        weights: Weight of each token of the vocabulary, from `token_weights`.
        count: Images of the global step divided by the number of ranks; micro-batches are summed, ranks averaged.
    """
    targets = _present(ids, logits.shape[1]) * weights
    targets = targets / targets.sum(dim=1, keepdim=True).clamp(min=torch.finfo(targets.dtype).tiny)
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum() / count


def count_captions(ids: Int[Tensor, "b L"], vocab_size: int) -> Float[Tensor, " V"]:
    """Count for each token the captions of all ranks that contain it; counts of micro-batches add up."""
    counts = _present(ids, vocab_size).sum(dim=0)
    if world()[1] > 1:
        dist.all_reduce(counts)
    return counts


def token_weights(
    num_containing: Float[Tensor, " V"], num_captions: int, ignored: Sequence[int] = ()
) -> Float[Tensor, " V"]:
    """Return the inverse document frequency log(D / (1 + df)) of each token, at least 0 (SuperClass, section 3.2).

    Args:
        num_containing: df, from `count_captions`.
        num_captions: D, the number of captions counted.
        ignored: Tokens that are not words, such as padding and the ends of a text; their weight is 0.
    """
    weights = (num_captions / (1 + num_containing)).log().clamp(min=0)
    for token in ignored:
        weights[token] = 0
    return weights


def _present(ids: Tensor, vocab_size: int) -> Float[Tensor, "b V"]:
    return torch.zeros(len(ids), vocab_size, device=ids.device).scatter_(1, ids, 1.0)
