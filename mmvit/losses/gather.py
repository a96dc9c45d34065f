"""Gathering rows from all processes with the gradient kept."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def world() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) where no process group runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(rows: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "B *rest"]:
    """Stack the equally many rows of all processes in rank order.

    The gradient of float rows flows back to the process that owns them, summed over all processes' losses. With a
    loss that each process averages over its own rows, DDP's mean over processes then gives exactly the gradient of
    the whole batch; a gather without gradient gives 1/W of it, or a wrong direction.
    """
    return rows if world()[1] == 1 else _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather did this and is deprecated in favour of a private module.

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty((world()[1] * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((len(gradient) // world()[1], *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
