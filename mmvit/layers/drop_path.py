"""Stochastic depth."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.layers.patch_dropout import patch_hashes

MAX_BRANCHES = 3  # of a block: attention, cross-attention and feed-forward network

_SEED = 3 * 2**32  # run seeds are below 2**32, and patch corruption uses two more ranges: independent draws


class DrawKey(NamedTuple):
    """What the random draws of a training step depend on.

    Attributes:
        positions: Positions of the samples in the run's infinite sample stream.
        seed: Seed of the run, below 2**32.
    """

    positions: Int[Tensor, "b"]
    seed: int


class DropPath(nn.Module):
    """Drop a residual branch for a fraction `rate` of the samples and scale it up for the others; training only.

    Stochastic depth (Huang et al. 2016), one draw per sample and branch: from torch's RNG state, or within `drawing`
    from a hash. The paper scales down in evaluation instead; the expectation is the same.

    Raises:
        ValueError: `rate` is not in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path {rate} is not in [0, 1)")
        self.rate = rate
        self.draws: Float[Tensor, "branches B"] | None = None  # uniform in [0, 1)

    def forward(self, x: Float[Tensor, "B *shape"], branch: int = 0) -> Float[Tensor, "B *shape"]:
        """Drop whole samples of one of the branches that share this layer, of at most `MAX_BRANCHES`."""
        if not self.training or not self.rate:
            return x
        shape = (len(x), *[1] * (x.ndim - 1))
        if self.draws is None:
            kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        else:
            draws = self.draws[branch]
            if len(x) != len(draws):  # in models of timm a sample can have several rows, such as windows
                draws = draws.repeat_interleave(len(x) // len(draws))
            kept = (draws >= self.rate).to(x.dtype).view(shape)
        return x * (kept / (1 - self.rate))


@contextmanager
def drawing(model: nn.Module, key: DrawKey | None) -> Iterator[None]:
    """Draw what drops in the forward and backward passes of this block from a hash of (seed, position, layer, branch).

    The draws are then the same for every split of a batch over micro-batches and ranks, and in every recomputation.
    Without a key they come from torch's RNG state.
    """
    layers = [module for module in model.modules() if isinstance(module, DropPath) and module.rate]
    if key is None or not layers:
        yield
        return
    hashes = patch_hashes(key.positions, len(layers) * MAX_BRANCHES, key.seed + _SEED)
    uniform = ((hashes >> 40) & 0xFFFFFF).T.float() / 2**24  # [layers * branches, B]
    for layer, draws in zip(layers, uniform.split(MAX_BRANCHES), strict=True):
        layer.draws = draws.clone()
    try:
        yield
    finally:
        for layer in layers:
            layer.draws = None


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the rate of each block, from 0 in the first to `last` in the last (Huang et al. 2016, equation 4)."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]
