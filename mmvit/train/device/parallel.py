"""The model spread over processes: DDP, and FSDP2 with its shards gathered and cut for checkpoints."""

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
    """Return what DDP is told: gradients live in the buckets that are sent, which saves a copy of all.

    Not a static graph: that is recorded in the first pass and broken by passes without gradient, by steps whose first
    parts add up locally, and by stages of a curriculum.
    """
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def make_shardable(accelerator: Accelerator, model: nn.Module) -> None:
    """Ready a model for `accelerate launch --use_fsdp --fsdp_version 2`; call before optimisers are built.

    FSDP2 refuses parameters without a dimension: in memory they get one, and on disk they have none. Blocks are the
    units that `--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` gathers one at a time. Keeping parameters in the main
    memory is accelerate's own `--fsdp_offload_params true`.

    Raises:
        UsageError: FSDP was asked for in its first version.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and accelerator.device.type == "cpu" and not accelerator.is_fsdp2:
        logger.warning("accelerate shards on accelerators only: on processors each process holds the whole model (DDP)")
    elif asked and not accelerator.is_fsdp2:
        raise UsageError(
            "the first version of FSDP cannot train this model", where="--use_fsdp", hint="add --fsdp_version 2"
        )
    if not accelerator.is_fsdp2:
        return
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # all processes made the same weights already
    if accelerator.mixed_precision == "bf16":  # logits stay in float32: embeddings, their scale, sums of gradients
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **_float32_scalars()
        )
    # Nothing changes what the model returns in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    # By class: activation checkpointing gives blocks another one.
    names = {type(module).__name__ for module in model.modules() if isinstance(module, BLOCKS)}
    model._no_split_modules = sorted(names)  # type: ignore[assignment]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert parameter.shape != (1,), f"{name} would be written as a scalar"
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def _float32_scalars() -> dict[str, Any]:
    if "param_dtype_override_fn" not in {field.name for field in dataclasses.fields(MixedPrecisionPolicy)}:
        return {}  # an older torch rounds the logit scale
    return {"param_dtype_override_fn": lambda parameter: parameter.dtype if parameter.shape == (1,) else None}


@contextlib.contextmanager
def syncing(model: nn.Module, on: bool) -> Iterator[None]:
    """Average gradients over the processes in the backward pass of this block, or add them up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with contextlib.nullcontext() if on or not isinstance(model, DistributedDataParallel) else model.no_sync():
            yield


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is spread over processes as a whole one, as it is on disk; all processes have to call."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.reshape(()) if full.shape == (1,) else full


def full_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as one process would have them: of a model, its average, or `flatten_state` of optimisers.

    All processes have to call. Where tensors are spread over them the result is in main memory, and only the main
    process gets one: the others would hold for nothing what they were spread to avoid.
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
    """Cut whole tensors, which each process has read, as those of the same name in `like` are cut."""
    return {name: _shard(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def shard_optimizer_state(tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Cut what `flatten_state` collected as the parameters of the optimisers are cut; the counts of steps are not."""
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
    # What does not fit is refused where it is loaded.
    if not isinstance(like, DTensor) or tensor.numel() != like.numel():
        return tensor
    tensor = tensor.reshape(like.shape).to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # nothing is sent
