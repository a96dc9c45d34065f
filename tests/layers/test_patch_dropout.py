"""Patch dropout depends only on (seed, position), keeps exactly K patches, and is uniform."""

import numpy as np
import pytest
import torch

from mmvit.layers.patch_dropout import kept_patches


def by_numpy(position: int, num_patches: int, num_kept: int, seed: int) -> list[int]:
    """Compute the same with unsigned integers: SplitMix64's published constants, patch by patch."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    ranks = np.array([mix(mix(mix(seed) ^ position) ^ patch) for patch in range(num_patches)], np.uint64).view(np.int64)
    return sorted(np.argsort(ranks)[:num_kept].tolist())


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (3, 12_345_678_901), (2**32 - 1, 2**40)])
def test_equals_splitmix64_in_unsigned_numbers(seed: int, position: int):
    kept = kept_patches(torch.tensor([position]), 49, 0.5, seed)
    assert kept.tolist() == [by_numpy(position, 49, 24, seed)]


@pytest.mark.parametrize(
    ("num_patches", "share", "num_kept"), [(196, 0.5, 98), (36, 0.3, 25), (4, 0.99, 1), (9, 0.0, 9), (1, 0.5, 1)]
)
def test_exactly_k_different_patches_in_rising_order(num_patches: int, share: float, num_kept: int):
    kept = kept_patches(torch.arange(50), num_patches, share, seed=1)
    assert kept.shape == (50, num_kept)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < num_patches


def test_a_split_batch_draws_the_same_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    positions = torch.arange(1000, 1064)
    whole = kept_patches(positions, 49, 0.5, seed=7)
    parts = [kept_patches(part, 49, 0.5, seed=7) for part in positions.split([5, 1, 26, 32])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_and_position_change_the_draw():
    kept = kept_patches(torch.arange(64), 196, 0.5, seed=0)
    other = kept_patches(torch.arange(64), 196, 0.5, seed=1)
    assert (kept != other).any(dim=1).all()
    assert len({tuple(row) for row in kept.tolist()}) == 64


def test_each_patch_and_each_pair_is_as_likely_as_any_other():
    """20,000 draws of 10 out of 20: counts within five standard deviations, and the chi-square within its 1e-6 tail."""
    num_draws = 20_000
    kept = torch.zeros(num_draws, 20)
    kept.scatter_(1, kept_patches(torch.arange(num_draws), 20, 0.5, seed=0), 1)
    deviation = (num_draws * 0.25) ** 0.5
    assert (kept.sum(dim=0) - num_draws / 2).abs().max() < 5 * deviation
    together = (kept.T @ kept)[*torch.triu_indices(20, 20, 1)]  # expected: 10/20 * 9/19 of the draws
    chance = 0.5 * 9 / 19
    assert (together - num_draws * chance).abs().max() < 5 * (num_draws * chance * (1 - chance)) ** 0.5
    follows = (kept[1:] * kept[:-1]).sum(dim=0)  # kept in one image and in the next one
    assert (follows - num_draws / 4).abs().max() < 5 * (num_draws * 3 / 16) ** 0.5


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    positions = torch.arange(256) + 2**33
    on_gpu = kept_patches(positions.cuda(), 196, 0.5, seed=5)
    assert torch.equal(on_gpu.cpu(), kept_patches(positions, 196, 0.5, seed=5))
