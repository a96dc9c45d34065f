"""Patches that are masked or replaced before the blocks, for masked patch prediction."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmvit.layers.patch_dropout import kept_patches, patch_hashes

# Fractions of the corrupted patches; the others stay unchanged (Dosovitskiy et al. 2021, appendix B.1.2).
HIDDEN, REPLACED = 0.8, 0.1

_SEEDS = 2**32  # run seeds are smaller; seeds above it give independent draws


class Corruption(NamedTuple):
    """What happens to each patch.

    Attributes:
        corrupted: patches to predict, including those of them that stay unchanged.
        hidden: patches that are replaced by the mask embedding.
        source: index of the patch used at each position: its own, or another one of the same image.
    """

    corrupted: Bool[Tensor, "b N"]
    hidden: Bool[Tensor, "b N"]
    source: Int[Tensor, "b N"]


def corrupted_patches(positions: Int[Tensor, "b"], num_patches: int, seed: int, share: float = 0.5) -> Corruption:
    """Draw the patches to predict and how each is corrupted, from a hash of (seed, position, patch) alone.

    Each image has as many of them as `kept_patches` would drop.

    Args:
        positions: positions of the samples in the run's infinite sample stream.
        num_patches: number of patches per image.
        seed: seed of the run, below 2**32.
        share: fraction of the patches to corrupt.
    """
    kept = kept_patches(positions, num_patches, share, seed + _SEEDS)
    corrupted = torch.ones(len(positions), num_patches, dtype=torch.bool, device=positions.device)
    corrupted.scatter_(1, kept, False)
    hashes = patch_hashes(positions, num_patches, seed + 2 * _SEEDS)
    choice = (hashes >> 32) & 0xFFFFFFFF  # the upper bits choose one of the three, the lower the replacement's offset
    hidden = choice < int(HIDDEN * 2**32)
    replaced = ~hidden & (choice < int((HIDDEN + REPLACED) * 2**32))
    own = torch.arange(num_patches, device=positions.device)
    other = (own + 1 + (hashes & 0xFFFFFFFF) % max(1, num_patches - 1)) % num_patches
    return Corruption(corrupted, corrupted & hidden, torch.where(corrupted & replaced, other, own))


def corrupt(
    tokens: Float[Tensor, "b N D"], corruption: Corruption, mask_embedding: Float[Tensor, " D"]
) -> Float[Tensor, "b N D"]:
    """Return the embedded patches, before positions are added, with some masked and some replaced."""
    tokens = tokens.gather(1, corruption.source[:, :, None].expand_as(tokens))
    return torch.where(corruption.hidden[:, :, None], mask_embedding.to(tokens.dtype), tokens)
