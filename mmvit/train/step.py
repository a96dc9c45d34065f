"""One training step."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mmvit.data.batches import Batch
from mmvit.losses.contrastive import contrastive_loss


class StepResult(NamedTuple):
    """What a step yields, still on the device."""

    loss: Tensor
    grad_norm: Tensor


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[Optimizer],
    batch: Batch,
    *,
    clip_norm: float | None,
    same_caption_positives: bool,
) -> StepResult:
    """Forward, loss over the global batch, backward, clip, update, clamp; the loss is this process's share."""
    device = accelerator.device
    images, ids = batch.images.to(device, non_blocking=True), batch.ids.to(device, non_blocking=True)
    groups = batch.groups.to(device, non_blocking=True) if same_caption_positives else None

    embeddings = model(images, ids)
    losses = [
        contrastive_loss(embeddings.image, text, embeddings.logit_scale, None if groups is None else groups[:, view])
        for view, text in enumerate(embeddings.text.unbind(dim=1))
    ]
    loss = torch.stack(losses).mean()

    accelerator.backward(loss)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), float("inf") if clip_norm is None else clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    accelerator.unwrap_model(model).clamp_logit_scale()
    return StepResult(loss.detach(), grad_norm)
