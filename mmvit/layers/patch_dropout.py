"""Patch dropout: the patches that the image tower processes in a training step."""

import torch
from jaxtyping import Int
from torch import Tensor

_STRIDE = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2^64 over the golden ratio, as a signed number


def kept_patches(positions: Int[Tensor, "b"], num_patches: int, share: float, seed: int) -> Int[Tensor, "b K"]:
    """Draw the K = max(1, round(num_patches * (1 - share))) patches to keep, in ascending order (FLIP, Li et al. 2023).

    An integer hash of (seed, position, patch) ranks the patches of each image, so that the draw is the same on
    every device, for every split of the batch and in every recomputation, and no RNG state is used.

    Args:
        positions: positions of the samples in the run's infinite sample stream.
        num_patches: number of patches per image.
        share: fraction of the patches to drop, in [0, 1).
        seed: seed of the run.
    """
    num_kept = max(1, round(num_patches * (1 - share)))
    ranks = patch_hashes(positions, num_patches, seed)
    return ranks.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def patch_hashes(positions: Int[Tensor, "b"], num_patches: int, seed: int) -> Int[Tensor, "b N"]:
    """Return a hash of (seed, position, patch); it is unique within an image because `_mix` is one-to-one."""
    rows = _mix(_mix(torch.tensor(seed, device=positions.device)) ^ positions.long())
    return _mix(rows[:, None] ^ torch.arange(num_patches, device=positions.device))


def _mix(x: Tensor) -> Tensor:
    """Apply one step of SplitMix64 (Steele et al. 2014, figure 17) in int64, which wraps around like uint64."""
    x = x + _STRIDE
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift of a signed integer fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
