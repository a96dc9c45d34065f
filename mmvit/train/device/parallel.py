"""Data parallelism: DDP, and FSDP2 whose tensors are gathered for checkpoints and sharded again."""

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from data_tools.core.errors import UsageError
from mmvit.losses.gather import world
from mmvit.train.device.memory import BLOCKS

logger = logging.getLogger(__name__)


def ddp_arguments() -> DistributedDataParallelKwargs:
    """Return the arguments of DDP: gradients are views of the communication buckets, which saves a copy.

    The graph is not static: passes without gradients, steps whose first micro-batches accumulate locally, and stages
    of a curriculum change it.
    """
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def make_shardable(accelerator: Accelerator, model: nn.Module) -> None:
    """Prepare a model for `accelerate launch --use_fsdp --fsdp_version 2`; call before optimizers are built.

    FSDP2 rejects 0-dimensional parameters: in memory they have shape [1], on disk they are scalars. Blocks are the
    units that `--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` gathers one at a time. To keep parameters in main
    memory use `--fsdp_offload_params true` of accelerate.

    Raises:
        UsageError: FSDP version 1 was requested.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and accelerator.device.type == "cpu" and not accelerator.is_fsdp2:
        logger.warning("accelerate shards only on accelerators: on CPUs each rank keeps the full model (DDP)")
    elif asked and not accelerator.is_fsdp2:
        raise UsageError("FSDP version 1 is not supported", where="--use_fsdp", hint="add --fsdp_version 2")
    if not accelerator.is_fsdp2:
        return
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # all ranks have the same weights already
    if accelerator.mixed_precision == "bf16":  # float32 for logits: embeddings, their scale, gradient reduction
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **_float32_scalars()
        )
    # Nothing modifies the outputs of the model in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    # By name of the class: activation checkpointing changes the class of blocks.
    names = {type(module).__name__ for module in model.modules() if isinstance(module, BLOCKS)}
    model._no_split_modules = sorted(names)  # type: ignore[assignment]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert parameter.shape != (1,), f"{name} would be written as a scalar"
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def _float32_scalars() -> dict[str, Any]:
    if "param_dtype_override_fn" not in {field.name for field in dataclasses.fields(MixedPrecisionPolicy)}:
        return {}  # older versions of torch round the logit scale
    return {"param_dtype_override_fn": lambda parameter: parameter.dtype if parameter.shape == (1,) else None}


@contextlib.contextmanager
def syncing(model: nn.Module, on: bool) -> Iterator[None]:
    """Average gradients over the ranks in the backward pass of this block if `on`, else accumulate them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with contextlib.nullcontext() if on or not isinstance(model, DistributedDataParallel) else model.no_sync():
            yield


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor into a full one, shaped as on disk; all ranks must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.reshape(()) if full.shape == (1,) else full


def full_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather the sharded tensors of a model, its EMA weights, or the `flatten_state` of optimizers.

    All ranks must call this. Gathered tensors are in main memory, and only the main rank returns them, so that the
    other ranks do not hold a full copy.
    """
    full = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if gathered is tensor:
            full[name] = tensor
        elif world()[0] == 0:
            full[name] = gathered.cpu()
    return full


def shard_state(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard full tensors, which each rank has read, like the tensors of the same names in `like`."""
    return {name: _shard(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def shard_optimizer_state(tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Shard the tensors of `flatten_state` like the parameters of the optimizers, except for the step counts."""
    parameters = {
        f"{i}.{index}": parameter
        for i, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(each for group in optimizer.param_groups for each in group["params"])
    }
    owners = {name: name.rpartition(".") for name in tensors}
    like = {
        name: parameters[owner] for name, (owner, _, entry) in owners.items() if entry != "step" and owner in parameters
    }
    return shard_state(tensors, like)


def _shard(tensor: Tensor, like: Tensor) -> Tensor:
    # Tensors of another shape are rejected when they are loaded.
    if not isinstance(like, DTensor) or tensor.numel() != like.numel():
        return tensor
    tensor = tensor.reshape(like.shape).to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # nothing is sent
