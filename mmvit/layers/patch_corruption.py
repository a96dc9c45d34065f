"""Which patches are hidden or replaced before the blocks, for masked patch prediction."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmvit.layers.patch_dropout import kept_patches, patch_hashes

# Of the corrupted patches; the others stay as they are (Dosovitskiy et al. 2021, appendix B.1.2).
HIDDEN, REPLACED = 0.8, 0.1

_SEEDS = 2**32  # seeds of runs lie below: above it, they draw something else


class Corruption(NamedTuple):
    """What becomes of each patch.

    Attributes:
        corrupted: patches that are to be predicted, those among them that stay as they are included.
        hidden: patches in whose place the mask embedding stands.
        source: the patch that stands in each place: the own one, or another of the same image.
    """

    corrupted: Bool[Tensor, "b N"]
    hidden: Bool[Tensor, "b N"]
    source: Int[Tensor, "b N"]


def corrupted_patches(positions: Int[Tensor, "b"], num_patches: int, seed: int, share: float = 0.5) -> Corruption:
    """Draw the patches to predict and what becomes of them, by a hash of (seed, position, patch) alone.

    In each image they are as many as `kept_patches` would drop.

    Args:
        positions: of the samples, in the endless stream of the run.
        num_patches: of an image.
        seed: of the run, below 2**32.
        share: of the patches that are corrupted.
    """
    kept = kept_patches(positions, num_patches, share, seed + _SEEDS)
    corrupted = torch.ones(len(positions), num_patches, dtype=torch.bool, device=positions.device)
    corrupted.scatter_(1, kept, False)
    hashes = patch_hashes(positions, num_patches, seed + 2 * _SEEDS)
    choice = (hashes >> 32) & 0xFFFFFFFF  # which of the three, and below by how many places to look for another patch
    hidden = choice < int(HIDDEN * 2**32)
    replaced = ~hidden & (choice < int((HIDDEN + REPLACED) * 2**32))
    own = torch.arange(num_patches, device=positions.device)
    other = (own + 1 + (hashes & 0xFFFFFFFF) % max(1, num_patches - 1)) % num_patches
    return Corruption(corrupted, corrupted & hidden, torch.where(corrupted & replaced, other, own))


def corrupt(
    tokens: Float[Tensor, "b N D"], corruption: Corruption, mask_embedding: Float[Tensor, " D"]
) -> Float[Tensor, "b N D"]:
    """Return embedded patches, still without positions, in which some are hidden and some replaced."""
    tokens = tokens.gather(1, corruption.source[:, :, None].expand_as(tokens))
    return torch.where(corruption.hidden[:, :, None], mask_embedding.to(tokens.dtype), tokens)
