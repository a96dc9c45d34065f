"""The Muon optimizer, for devices with and without bfloat16 units."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmvit.train.device.precision import has_bf16_units

# Quintic Newton-Schulz coefficients with the steepest slope at zero (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024): the update of `torch.optim.Muon`, faster.

    `torch.optim.Muon` processes one matrix at a time, always in bfloat16, which a CPU without bfloat16 units emulates
    about a hundred times slower. Here matrices of equal shape are orthogonalized in one batch, in float32 if bfloat16
    would be emulated. Convolution kernels are treated as matrices [out, in * height * width].
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        num_steps: int = 5,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "num_steps": num_steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[0], parameter.numel() // parameter.shape[0]].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_equal_shapes(shape, parameters, group)
        return loss

    def _step_equal_shapes(self, shape: tuple[int, int], parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov
        matrices = torch.stack([update.view(shape) for update in updates])
        directions = orthogonalize(matrices, group["num_steps"])
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        steps = [direction.view_as(parameter) for direction, parameter in zip(directions, parameters, strict=True)]
        torch._foreach_add_(parameters, steps, alpha=-group["lr"] * scale)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalize(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Push the singular values of each matrix [M, m, n] towards 1; the result lies within about [0.7, 1.2]."""
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16 if has_bf16_units(matrices.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).contiguous()
