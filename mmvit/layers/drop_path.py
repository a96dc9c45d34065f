"""Stochastic depth."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch for a fraction `rate` of the samples and scale it up for the others; training only.

    Stochastic depth (Huang et al. 2016), one draw per sample from torch's RNG state. The paper scales down in
    evaluation instead; the expectation is the same.

    Raises:
        ValueError: `rate` is not in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path {rate} is not in [0, 1)")
        self.rate = rate

    def forward(self, x: Float[Tensor, "B *shape"]) -> Float[Tensor, "B *shape"]:
        """Drop whole samples."""
        if not self.training or not self.rate:
            return x
        kept = torch.empty((len(x), *[1] * (x.ndim - 1)), dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the rate of each block, from 0 in the first to `last` in the last (Huang et al. 2016, equation 4)."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]
