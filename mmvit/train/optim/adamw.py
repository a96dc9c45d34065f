"""AdamW whose update is rescaled for each tensor: StableAdamW and LAMB."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


class RescaledAdamW(AdamW):
    """AdamW whose update of each tensor is multiplied by a factor; with a factor of 1 it equals AdamW bit for bit.

    The state is that of AdamW. Other implementations do not keep their whole state in tensors by parameter (timm's
    LAMB, optimi, pytorch_optimizer), or do not apply the factor to weight decay (timm's AdamW), and none has a fused
    kernel. Using torch's kernel costs a copy of the weights during a step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        before = {p: p.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in before:
                    factor = self.factor(parameter, before[parameter], group)
                    parameter.lerp_(before[parameter], 1 - factor)
        return loss

    def factor(self, parameter: Tensor, before: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the factor [] for the update of a parameter from `before` to its current value."""
        raise NotImplementedError


class StableAdamW(RescaledAdamW):
    """AdamW with update clipping: a step is divided by the RMS of g / sqrt(v) over its tensor, where that exceeds 1.

    Wortsman et al. 2023, algorithm 2: v lags behind suddenly growing gradients, which causes loss spikes.
    """

    def factor(self, parameter: Tensor, before: Tensor, group: dict[str, Any]) -> Tensor:
        """Return 1 / max(1, RMS)."""
        assert parameter.grad is not None
        state = self.state[parameter]
        # v starts at zero; in float32 the first differences would lose up to four digits.
        correction = (1 - group["betas"][1] ** state["step"].double()).float()
        variance = state["exp_avg_sq"].clamp(min=group["eps"] ** 2 * correction)
        mean_square = parameter.grad.square().div_(variance).mean() * correction
        return mean_square.clamp(min=1).rsqrt()


class Lamb(RescaledAdamW):
    """LAMB: the norm of an update is the learning rate times the norm of its tensor (You et al. 2020, algorithm 2).

    As in NVIDIA's version, norms, biases, tokens and other tables get the plain AdamW update.
    """

    def factor(self, parameter: Tensor, before: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the trust ratio; 1 for a tensor that is zero or unchanged."""
        length, way = group["lr"] * before.norm(), (before - parameter).norm()
        adapted = (length > 0) & (way > 0) & group["adapts"]
        return torch.where(adapted, length / way, 1.0)
