"""One training step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mmvit.models.dual_encoder import Embeddings
from mmvit.train.device.bf16 import Bf16Copy
from mmvit.train.device.parallel import syncing, whole


class StepResult(NamedTuple):
    """What a step yields, equal on all processes."""

    losses: dict[str, float]  # of the global batch, weighted, by name
    grad_norm: float
    skipped: str | None  # why the weights were left as they were

    @property
    def loss(self) -> float:
        """The sum of the losses."""
        return sum(self.losses.values())


class Part(NamedTuple):
    """A micro-batch on the device: what the model is called with, and what its output is held against."""

    inputs: tuple[Any, ...]
    targets: Any


class Objective(ABC):
    """The weighted losses; each value is this process's share, whose mean over processes is that of the global batch.

    Losses between samples need all rows of a step at once (`between`, where `compares` is true); losses within samples
    may be taken part by part (`within`), for they are divided by the totals of the step.
    """

    compares: bool

    @abstractmethod
    def totals(self, parts: Sequence[Part]) -> Any:
        """Count over all parts of a step and all processes."""

    @abstractmethod
    def between(self, rows: Any, targets: Any) -> dict[str, Tensor]:
        """Return the losses that compare samples, by name and weighted; `rows` are all rows of this process."""

    @abstractmethod
    def within(self, rows: Any, part: Part, totals: Any) -> dict[str, Tensor]:
        """Return the losses of single samples, by name and weighted; their values over the parts of a step add up."""


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
    """Forward, losses over the global batch, backward, clip, and update, unless `refuse` gives a reason not to.

    Several parts give the gradients of the one batch that they are parts of. `refuse` is asked with the loss and the
    norm of the gradient.
    """
    totals = objective.totals(parts)
    backward = _backward_cached if objective.compares and len(parts) > 1 else _backward
    losses = backward(accelerator, model, objective, parts, totals)
    if bf16 is not None:
        bf16.pull_gradients()
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(trained, float("inf") if clip_norm is None else clip_norm))
    *values, grad_norm = accelerator.reduce(torch.stack([*losses.values(), norm]), "mean").tolist()
    skipped = refuse(sum(values), grad_norm)
    for optimizer in optimizers:
        if skipped is None:
            optimizer.step()
        optimizer.zero_grad()
    return StepResult(dict(zip(losses, values, strict=True)), grad_norm, skipped)


def _backward(
    accelerator: Accelerator, model: nn.Module, objective: Objective, parts: Sequence[Part], totals: Any
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        with syncing(model, i == len(parts) - 1):
            rows = model(*part.inputs)
            losses = objective.between(rows, part.targets) | objective.within(rows, part, totals)
            accelerator.backward(torch.stack(list(losses.values())).sum())
        for name, value in losses.items():
            values[name] = values.get(name, 0) + value.detach()
    return values


def _backward_cached(
    accelerator: Accelerator, model: nn.Module, objective: Objective, parts: Sequence[Part], totals: Any
) -> dict[str, Tensor]:
    """GradCache (Gao et al. 2021, section 3.2): embed all parts, take the loss of all, then send its gradient back.

    Negatives are those of the whole batch, and the second pass draws what the first drew. Plain accumulation would
    compare only samples of the same part: another loss.
    """
    states, embedded = [], []
    for part in parts:
        states.append(_random_state(accelerator.device))
        with torch.no_grad():
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
        with syncing(model, i == len(parts) - 1):
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
    """Put the targets of all parts under each other."""
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))


def _leaf(parts: Sequence[Tensor | None]) -> Any:
    """Put the rows of all parts under each other, as a leaf whose gradient can be read; a number is the same in all."""
    first = parts[0]
    if first is None:
        return None
    whole = torch.cat([part for part in parts if part is not None]) if first.ndim else first.clone()
    return whole.requires_grad_()


def _shares(leaf: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return the gradient of a leaf by parts; that of a number goes to the first."""
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return gradient.split(list(sizes)) if leaf.ndim else [gradient, *[torch.zeros_like(leaf)] * (len(sizes) - 1)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
