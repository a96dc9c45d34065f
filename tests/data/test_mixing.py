"""What is mixed with what, and how much, follows from (seed, position) alone; the targets say what the pixels hold."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import rand_bbox
from torch import Tensor

from mmvit.config.validate import validate
from mmvit.data import mixing
from mmvit.data.mixing import MixConfig, mix_pairs
from mmvit.losses.classification import soft_targets
from mmvit.models.pixels import CLIP_MEAN, CLIP_STD, PixelNorm

MIXUP, CUTMIX, BOTH = MixConfig(mixup=0.8), MixConfig(cutmix=1.0), MixConfig(mixup=0.8, cutmix=1.0)
CONFIGS = pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
K = 5


def batch(num: int, first: int = 0, side: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Images, targets and positions; row i is the same for every `num`."""
    positions = torch.arange(first, first + num)
    images = [torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(int(p))) for p in positions]
    return torch.stack(images).to(torch.uint8), soft_targets(positions % K, K, 0.1), positions


def swapped(rows: Tensor) -> Tensor:
    return torch.stack([rows[i ^ 1] for i in range(len(rows))])


def own_shares(num_pairs: int, config: MixConfig) -> np.ndarray:
    """How much of themselves the images of each pair keep."""
    return np.array([mixing._draw(pair, 224, 224, config, seed=0)[5] for pair in range(num_pairs)])


def test_d4_mixup_blends_neighbours_and_their_targets():
    """lambda x_i + (1 - lambda) x_j, lambda y_i + (1 - lambda) y_j, and the same lambda for both of the pair."""
    images, targets, positions = batch(32)
    mixed = mix_pairs(images, targets, positions, MIXUP, seed=1)
    assert mixed.images.dtype == torch.uint8
    one_hot = mix_pairs(images, torch.eye(32), positions, MIXUP, seed=1).targets
    shares = one_hot.diagonal()
    assert torch.equal(shares[::2], shares[1::2])
    assert len(set(shares.tolist())) == 16
    share = shares[:, None]
    assert torch.allclose(one_hot, share * torch.eye(32) + (1 - share) * swapped(torch.eye(32)))
    assert torch.allclose(mixed.targets, share * targets + (1 - share) * swapped(targets))
    assert torch.allclose(mixed.targets.sum(dim=1), torch.ones(32))
    share = share.double()[:, :, None, None]
    expected = share * images.double() + (1 - share) * swapped(images).double()
    assert (mixed.images - expected).abs().max() <= 0.5
    assert (mix_pairs(images.double(), targets, positions, MIXUP, seed=1).images - expected).abs().max() < 1e-4


def test_d4_cutmix_exchanges_one_rectangle_whose_area_is_the_share():
    images, targets, positions = batch(64)
    mixed = mix_pairs(images, targets, positions, CUTMIX, seed=1)
    shares = mix_pairs(images, torch.eye(64), positions, CUTMIX, seed=1).targets.diagonal()
    foreign = (mixed.images != images).any(dim=1)
    assert torch.equal(mixed.images, torch.where(foreign[:, None], swapped(images), images))
    areas = []
    for i in range(64):
        assert torch.equal(foreign[i], foreign[i ^ 1])
        rows, columns = foreign[i].any(dim=1), foreign[i].any(dim=0)
        assert torch.equal(foreign[i], rows[:, None] & columns)  # a rectangle without holes
        assert all((side.int().diff() != 0).sum() <= 2 for side in (rows, columns))  # in one piece
        areas.append(foreign[i].float().mean())
    assert torch.allclose(shares, 1 - torch.tensor(areas), atol=1e-6)
    expected = shares[:, None] * targets + (1 - shares[:, None]) * swapped(targets)
    assert torch.allclose(mixed.targets, expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 23), (224, 224), (1, 9)])
def test_the_rectangle_is_that_of_timm(height: int, width: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    for _ in range(50):
        share, at = rng.random(), rng.random(2)
        centres = iter([int(height * at[0]), int(width * at[1])])
        monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(centres))  # noqa: B023
        ratio = np.sqrt(1 - share)
        found = (*mixing._span(height, at[0], ratio), *mixing._span(width, at[1], ratio))
        assert found == rand_bbox((3, height, width), share)


@CONFIGS
def test_a_split_batch_is_mixed_the_same(config: MixConfig):
    images, targets, positions = batch(24, first=10**12)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    whole = mix_pairs(images, targets, positions, config, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    cuts = [images.split(sizes := [2, 12, 4, 6]), targets.split(sizes), positions.split(sizes)]
    parts = [mix_pairs(*part, config, seed=3) for part in zip(*cuts, strict=True)]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    assert torch.equal(images, batch(24, first=10**12)[0])  # what came in stays as it is


@CONFIGS
def test_seed_and_position_change_the_mixture(config: MixConfig):
    images, targets, positions = batch(32)
    found = [mix_pairs(images, targets, positions + 32 * i, config, seed).targets for seed in (0, 1) for i in (0, 1)]
    assert all((found[i] != found[j]).any(dim=1).sum() > 24 for i in range(4) for j in range(i))


@CONFIGS
def test_mixing_commutes_with_the_normalisation_of_pixels(config: MixConfig):
    images, targets, positions = batch(16)
    norm = PixelNorm(CLIP_MEAN, CLIP_STD)
    before = norm(mix_pairs(images, targets, positions, config, seed=0).images)
    after = mix_pairs(norm(images), targets, positions, config, seed=0).images
    assert (before - after).abs().max() <= 0.51 / 255 / min(CLIP_STD)


@pytest.mark.parametrize(("config", "alpha"), [(MIXUP, 0.8), (MixConfig(mixup=0.5), 0.5), (MixConfig(mixup=3.0), 3.0)])
def test_the_share_has_the_beta_distribution(config: MixConfig, alpha: float):
    assert stats.kstest(own_shares(4000, config), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_rectangles_are_as_large_as_their_distribution_says():
    """A part r of a side about a centre anywhere on it loses r^2 / 4 on average beyond the border."""
    taken = 1 - own_shares(4000, CUTMIX)
    part = np.sqrt(1 - (np.arange(10_000) + 0.5) / 10_000)  # of each side; the share is uniform for alpha 1
    expected = ((part - part**2 / 4) ** 2).mean()
    assert abs(taken.mean() - expected) < 4 * taken.std() / 4000**0.5 + 1 / 224


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prob", [0.0, 0.7, 1.0])
def test_switch_and_prob_are_shares_of_the_pairs(switch: float, prob: float):
    num = 2000
    draws = [mixing._draw(i, 256, 256, MixConfig(0.8, 1.0, switch, prob), seed=0) for i in range(num)]
    cut, blended = (sum(draw[0] == 0 for draw in draws), sum(0 < draw[0] < 2**16 for draw in draws))
    for count, chance in ((cut, prob * switch), (blended, prob * (1 - switch))):
        assert abs(count - num * chance) <= 4 * (num * chance * (1 - chance)) ** 0.5 + 2


@pytest.mark.parametrize("config", [MixConfig(), MixConfig(0.8, 1.0, prob=0.0)])
def test_nothing_is_mixed_where_it_is_off(config: MixConfig):
    images, targets, positions = batch(8)
    for kind in (images, images.float()):
        mixed = mix_pairs(kind, targets, positions, config, seed=0)
        assert torch.equal(mixed.images, kind)
        assert torch.equal(mixed.targets, targets)


@pytest.mark.parametrize("kept", [slice(3), slice(1, 5), [0, 1, 4, 3], [0, 2], slice(1)])
def test_half_pairs_are_refused(kept: slice | list[int]):
    images, targets, positions = (rows[kept] for rows in batch(8))
    with pytest.raises(ValueError, match="whole pairs of neighbours"):
        mix_pairs(images, targets, positions, BOTH, seed=0)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (MixConfig(mixup=-0.1), "mixup"),
        (MixConfig(mixup=float("nan")), "mixup"),
        (MixConfig(cutmix=float("inf")), "cutmix"),
        (MixConfig(switch=1.1), "switch"),
        (MixConfig(prob=-0.1), "prob"),
    ],
)
def test_bad_values_name_their_key(config: MixConfig, key: str):
    (problem,) = validate(MixConfig, dataclasses.asdict(config), strict=True)[1]
    assert problem.key == key
    assert problem.what.startswith(f"{key} is ")


def test_good_values_pass():
    for config in (MixConfig(), BOTH, MixConfig(switch=1.0, prob=0.0)):
        assert validate(MixConfig, dataclasses.asdict(config), strict=True)[1] == []


@pytest.mark.gpu
@CONFIGS
def test_a_gpu_mixes_the_same_pixels(config: MixConfig):
    images, targets, positions = batch(32)
    here = mix_pairs(images, targets, positions, config, seed=0)
    there = mix_pairs(images.cuda(), targets.cuda(), positions, config, seed=0)
    assert torch.equal(there.images.cpu(), here.images)
    assert torch.allclose(there.targets.cpu(), here.targets, atol=1e-6)
