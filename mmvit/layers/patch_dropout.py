"""Which patches a training step lets the image tower see."""

import torch
from jaxtyping import Int
from torch import Tensor

_STRIDE = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2^64 over the golden ratio, as a signed number


def kept_patches(positions: Int[Tensor, "b"], num_patches: int, share: float, seed: int) -> Int[Tensor, "b K"]:
    """Draw the patches that stay, K = max(1, round(num_patches * (1 - share))), in rising order (FLIP, Li et al. 2023).

    A hash of (seed, position, patch) in whole numbers ranks the patches of each image, so that the draw is the same on
    every device, for every split of the batch and in every recomputation, and no random state is touched.

    Args:
        positions: of the samples, in the endless stream of the run.
        num_patches: of an image.
        share: of the patches that are dropped, from 0 to below 1.
        seed: of the run.
    """
    num_kept = max(1, round(num_patches * (1 - share)))
    ranks = patch_hashes(positions, num_patches, seed)
    return ranks.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def patch_hashes(positions: Int[Tensor, "b"], num_patches: int, seed: int) -> Int[Tensor, "b N"]:
    """Return a hash of (seed, position, patch); no two patches of an image share theirs, for `_mix` is one-to-one."""
    rows = _mix(_mix(torch.tensor(seed, device=positions.device)) ^ positions.long())
    return _mix(rows[:, None] ^ torch.arange(num_patches, device=positions.device))


def _mix(x: Tensor) -> Tensor:
    """One step of SplitMix64 (Steele et al. 2014, figure 17) in int64, which wraps around as unsigned numbers do."""
    x = x + _STRIDE
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift of a signed number fills with its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
