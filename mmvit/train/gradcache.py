"""Gradient caching: the exact contrastive gradient of a batch that is larger than memory allows."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmvit.layers.drop_path import drawing
from mmvit.models.dual_encoder import Embeddings
from mmvit.train.contract import Objective, Part
from mmvit.train.device.parallel import syncing


def backward_cached(
    accelerator: Accelerator, model: nn.Module, objective: Objective, parts: Sequence[Part], totals: Any
) -> dict[str, Tensor]:
    """Compute losses and gradients of all micro-batches as of one batch (GradCache, Gao et al. 2021, section 3.2).

    Embed all micro-batches without gradients, compute the loss of all rows, then embed each micro-batch again and
    backpropagate the gradients of its rows. Negatives are those of the whole batch, and the second pass draws the same
    random numbers as the first. Plain gradient accumulation computes another loss: it compares only samples of the
    same micro-batch.
    """
    states, embedded = [], []
    for part in parts:
        states.append(_random_state(accelerator.device))
        with torch.no_grad(), drawing(model, part.draws):
            embedded.append(model(*part.inputs, heads=False)[:4])
    after = _random_state(accelerator.device)

    rows = Embeddings(*map(_leaf, zip(*embedded, strict=True)))
    losses = objective.between(rows, _concatenated([part.targets for part in parts]))
    torch.stack(list(losses.values())).sum().backward()
    values = {name: value.detach() for name, value in losses.items()}

    sizes = [len(part[0]) for part in embedded]
    cached = [_shares(leaf, sizes) for leaf in rows if leaf is not None]
    for i, part in enumerate(parts):
        _set_random_state(states[i], accelerator.device)
        with syncing(model, i == len(parts) - 1), drawing(model, part.draws):
            again: Embeddings = model(*part.inputs)
            inner = objective.within(again, part, totals)
            outputs = [output for output in again[:4] if output is not None]
            sent = [(output * shares[i]).sum() for output, shares in zip(outputs, cached, strict=True)]
            accelerator.backward(torch.stack([*sent, *inner.values()]).sum())
        for name, value in inner.items():
            values[name] = values.get(name, 0) + value.detach()
    _set_random_state(after, accelerator.device)
    return values


def _concatenated(parts: Sequence[Any]) -> Any:
    """Concatenate the targets of all micro-batches."""
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))


def _leaf(parts: Sequence[Tensor | None]) -> Any:
    """Concatenate the rows of all micro-batches into a leaf tensor with a gradient; a scalar is the same in all."""
    first = parts[0]
    if first is None:
        return None
    whole = torch.cat([part for part in parts if part is not None]) if first.ndim else first.clone()
    return whole.requires_grad_()


def _shares(leaf: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split the gradient of a leaf by micro-batches; that of a scalar goes to the first."""
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return gradient.split(list(sizes)) if leaf.ndim else [gradient, *[torch.zeros_like(leaf)] * (len(sizes) - 1)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
