"""One training step."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mmvit.layers.drop_path import drawing
from mmvit.train.contract import Objective, Part, StepResult
from mmvit.train.device.bf16 import Bf16Copy
from mmvit.train.device.parallel import syncing, whole
from mmvit.train.gradcache import backward_cached


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[Optimizer],
    objective: Objective,
    parts: Sequence[Part],
    *,
    clip_norm: float | None,
    refuse: Callable[[float, float], str | None],
    bf16: Bf16Copy | None = None,
) -> StepResult:
    """Compute the losses of the global batch and their gradients, clip, and update the weights.

    The gradients of several micro-batches equal those of the whole batch. `refuse` is called with the loss and the
    gradient norm; if it returns a reason, the weights are not updated.
    """
    totals = objective.totals(parts)
    if objective.compares and len(parts) > 1:
        losses = backward_cached(accelerator, model, objective, parts, totals)
    else:
        losses = dict[str, Tensor]()
        for i, part in enumerate(parts):
            with syncing(model, i == len(parts) - 1), drawing(model, part.draws):
                rows = model(*part.inputs)
                values = objective.between(rows, part.targets) | objective.within(rows, part, totals)
                accelerator.backward(torch.stack(list(values.values())).sum())
            losses = {name: losses.get(name, 0) + value.detach() for name, value in values.items()}
    if bf16 is not None:
        bf16.pull_gradients()
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(trained, float("inf") if clip_norm is None else clip_norm))
    *means, grad_norm = accelerator.reduce(torch.stack([*losses.values(), norm]), "mean").tolist()
    skipped = refuse(sum(means), grad_norm)
    for optimizer in optimizers:
        if skipped is None:
            optimizer.step()
        optimizer.zero_grad()
    return StepResult(dict(zip(losses, means, strict=True)), grad_norm, skipped)
