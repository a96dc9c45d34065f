"""Masked cross-entropy: the tokens of captions, the colours of corrupted patches."""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Count = float | int | Tensor
BITS = 3  # per channel of a patch's mean colour


def captioning_loss(
    logits: Float[Tensor, "b L V"], targets: Int[Tensor, "b L"], mask: Bool[Tensor, "b L"], count: Count
) -> Float[Tensor, ""]:
    """Return the cross-entropy of a caption's tokens (Yu et al. 2022, CoCa, equation 3).

    Args:
        logits: Logits of the token at each position.
        targets: Token ids at these positions.
        mask: True for tokens that count, False for padding.
        count: Unmasked tokens of the global step divided by the number of ranks; micro-batches are summed, ranks
            averaged.
    """
    return _masked_cross_entropy(logits, targets, mask, count)


def masked_patch_loss(
    logits: Float[Tensor, "b N C"], classes: Int[Tensor, "b N"], corrupted: Bool[Tensor, "b N"], count: Count
) -> Float[Tensor, ""]:
    """Return the cross-entropy of corrupted patches' mean colours (Dosovitskiy et al. 2021, appendix B.1.2).

    Args:
        logits: Logits of the 512 colours.
        classes: Classes from `mean_colour_classes`.
        corrupted: True for the patches to predict.
        count: Corrupted patches of the global step divided by the number of ranks; micro-batches are summed, ranks
            averaged.
    """
    return _masked_cross_entropy(logits, classes, corrupted, count)


def mean_colour_classes(patches: UInt8[Tensor, "b N F"]) -> Int[Tensor, "b N"]:
    """Return the class (0 to 511) of each patch cut by `patchify`: red, green and blue in 3 bits each."""
    channels = patches.unflatten(2, (-1, 3))
    bins = channels.sum(dim=2) * 2**BITS // (256 * channels.shape[2])  # integers: equal on every device
    red, green, blue = bins.unbind(dim=-1)
    return (red << 2 * BITS) + (green << BITS) + blue


def _masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor, count: Count) -> Tensor:
    ignored = -100
    targets = targets.masked_fill(~mask, ignored)
    logits = logits.float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=ignored, reduction="sum") / count
