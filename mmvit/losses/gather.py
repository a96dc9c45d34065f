"""Communication of rows between ranks; without a process group, there is one rank and nothing to do."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


def world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(rows: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "B *rest"]:
    """Concatenate the rows of all ranks in rank order, without gradient; each rank has the same number of rows."""
    if world()[1] == 1:
        return rows.detach()
    gathered = rows.new_empty((world()[1] * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.detach().contiguous())
    return gathered


def scatter_sum(rows: Float[Tensor, "B *rest"]) -> Float[Tensor, "b *rest"]:
    """Sum the ranks' tensors and return this rank's part of the rows: the transpose of `gather_rows`."""
    if world()[1] == 1:
        return rows
    own = rows.new_empty((len(rows) // world()[1], *rows.shape[1:]))
    dist.reduce_scatter_tensor(own, rows.contiguous())
    return own


def logsumexp_over_ranks(values: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return log(sum(exp(values))) over the ranks, element-wise."""
    if world()[1] == 1:
        return values
    top = values.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (values - top).exp_()
    dist.all_reduce(total)
    return total.log_().add_(top)


def pass_on(*tensors: Tensor) -> list[Tensor]:
    """Send the tensors to the next rank of the ring and return those of the previous one."""
    rank, size = world()
    if size == 1:
        return list(tensors)
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    moves = []
    for tag, (tensor, space) in enumerate(zip(sent, received, strict=True)):
        moves.append(dist.P2POp(dist.isend, tensor, (rank + 1) % size, tag=tag))
        moves.append(dist.P2POp(dist.irecv, space, (rank - 1) % size, tag=tag))
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return received
