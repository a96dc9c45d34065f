"""Cross-entropy at marked positions: captions token by token, hidden patches by their colour."""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Count = float | int | Tensor
BITS = 3  # of each of a patch's three mean colours


def captioning_loss(
    logits: Float[Tensor, "b L V"], targets: Int[Tensor, "b L"], mask: Bool[Tensor, "b L"], count: Count
) -> Float[Tensor, ""]:
    """Cross-entropy of a caption's tokens (Yu et al. 2022, CoCa, equation 3).

    Args:
        logits: For each place the logits of the token that stands there.
        targets: These tokens.
        mask: Tokens that count; padding does not.
        count: Counting tokens of the global step by the number of processes; parts of a step add up, processes are
            averaged.
    """
    return _masked_cross_entropy(logits, targets, mask, count)


def masked_patch_loss(
    logits: Float[Tensor, "b N C"], classes: Int[Tensor, "b N"], corrupted: Bool[Tensor, "b N"], count: Count
) -> Float[Tensor, ""]:
    """Cross-entropy of corrupted patches' mean colours (Dosovitskiy et al. 2021, appendix B.1.2).

    Args:
        logits: Of the 512 colours.
        classes: By `mean_colour_classes`.
        corrupted: Patches that were hidden or replaced in the input.
        count: Corrupted patches of the global step by the number of processes; parts of a step add up, processes are
            averaged.
    """
    return _masked_cross_entropy(logits, classes, corrupted, count)


def mean_colour_classes(patches: UInt8[Tensor, "b N F"]) -> Int[Tensor, "b N"]:
    """Return the class (0 to 511) of each flat patch, as `patchify` cuts them: red, green and blue in 3 bits each."""
    channels = patches.unflatten(2, (-1, 3))
    bins = channels.sum(dim=2) * 2**BITS // (256 * channels.shape[2])  # whole numbers: equal on every device
    red, green, blue = bins.unbind(dim=-1)
    return (red << 2 * BITS) + (green << BITS) + blue


def _masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor, count: Count) -> Tensor:
    ignored = -100
    targets = targets.masked_fill(~mask, ignored)
    logits = logits.float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=ignored, reduction="sum") / count
