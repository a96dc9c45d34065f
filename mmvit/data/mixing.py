"""Mixup and CutMix of neighbours in the stream of samples."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mmvit.data.config import MixConfig as MixConfig

_ONE = 2**16  # weights of pixels are whole numbers of which this is 1


class Mixed(NamedTuple):
    """Images of the type that came in, and the classes' shares in each."""

    images: Shaped[Tensor, "b 3 H W"]
    targets: Float[Tensor, "b C"]


def mix_pairs(
    images: Shaped[Tensor, "b 3 H W"],
    targets: Float[Tensor, "b C"],
    positions: Int[Tensor, "b"],
    config: MixConfig,
    seed: int,
) -> Mixed:
    """Mix the samples at positions 2i and 2i + 1 of the stream with each other (timm's mode "pair").

    Both of a pair get the same weight (Zhang et al. 2018, equation 1) or exchange the same rectangle, cut off at the
    border, whose real area then is the weight (Yun et al. 2019, section 3.1). What is drawn is a function of
    (seed, i) alone and uint8 images are mixed in whole numbers, so that neither the split of a batch nor the device
    changes a pixel. Mixing commutes with the normalisation of pixels, up to the rounding.

    Args:
        images: uint8, or floats.
        targets: the classes' shares in each image.
        positions: of the samples in the endless stream of the run, on the CPU.
        config: what is drawn.
        seed: of the run.

    Raises:
        ValueError: the samples are not whole pairs.
    """
    if len(positions) % 2 or (positions[::2] % 2).any() or (positions[1::2] - positions[::2] != 1).any():
        raise ValueError(
            f"mixup and CutMix need whole pairs of neighbours, not {len(positions)} samples from position "
            f"{positions[:1].tolist()}: the batch of each rank and micro-batch must be even"
        )
    height, width = images.shape[2:]
    draws = [_draw(pair, height, width, config, seed) for pair in (positions[::2] // 2).tolist()]
    boxes = torch.tensor([draw[:5] for draw in draws for _ in range(2)], dtype=torch.int32, device=images.device)
    inside, top, bottom, left, right = boxes.reshape(-1, 5, 1, 1, 1).unbind(dim=1)  # [b, 1, 1, 1] each
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    in_box = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    own = torch.where(in_box, inside, _ONE)  # [b, 1, H, W]
    shares = torch.tensor([draw[5] for draw in draws for _ in range(2)], device=targets.device, dtype=targets.dtype)
    return Mixed(_blend(images, _partners(images), own), torch.lerp(_partners(targets), targets, shares[:, None]))


def _draw(pair: int, height: int, width: int, config: MixConfig, seed: int) -> tuple[int, int, int, int, int, float]:
    """Return the weight of the own image inside a box, the box (rows, columns), and the share of the own image."""
    # The spawn key keeps the draws apart from those of samples, which are seeded by (seed, epoch, sample id).
    rng = np.random.default_rng(np.random.SeedSequence((seed, pair), spawn_key=(1,)))
    mixed, switched, at_y, at_x = rng.random(4)
    by_box = bool(config.cutmix) and (not config.mixup or switched < config.switch)
    alpha = config.cutmix if by_box else config.mixup
    if not alpha or mixed >= config.prob:
        return _ONE, 0, 0, 0, 0, 1.0
    share = rng.beta(alpha, alpha)
    if not by_box:
        weight = round(_ONE * share)
        return weight, 0, height, 0, width, weight / _ONE
    (top, bottom), (left, right) = (_span(side, at, np.sqrt(1 - share)) for side, at in ((height, at_y), (width, at_x)))
    return 0, top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width)


def _span(side: int, at: float, share: float) -> tuple[int, int]:
    """Return start and end of a part of a side, about a pixel that may lie anywhere on it."""
    length, centre = int(side * share), int(side * at)
    return max(0, centre - length // 2), min(side, centre + (length + 1) // 2)


def _blend(own: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    if own.dtype != torch.uint8:
        return torch.lerp(other, own, (weight / _ONE).to(own.dtype))
    mixed = own.int().sub_(other).mul_(weight).add_(_ONE // 2)  # in place: twice as fast as in new memory
    return mixed.bitwise_right_shift_(16).add_(other).to(torch.uint8)


def _partners(rows: Tensor) -> Tensor:
    """Swap the two samples of each pair."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
