"""One of the processes that train a small model: python parallel_rank.py KIND PARTS OUT [FROM]; no test itself.

KIND is one, ddp or fsdp. Starts from the checkpoint FROM, or trains some steps of micro-batches; writes to OUT the
checkpoint and what belongs to each step, as the main process sees it.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from mmvit.config import OptimConfig
from mmvit.losses.contrastive import contrastive_loss
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoderConfig, Embeddings
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.contract import Part
from mmvit.train.device.parallel import ddp_arguments, full_state, make_shardable, shard_optimizer_state, shard_state
from mmvit.train.optim.build import build_optimizers
from mmvit.train.optim.state import flatten_state, restore_state
from mmvit.train.runs.pretraining_loss import Targets
from mmvit.train.step import train_step

STEPS, BATCH = 20, 8
IMAGE = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2)
TEXT = TextConfig(vocab_size=50, context_length=8, end_of_text=49, width=32, depth=2, num_heads=2)


class Contrastive:
    """The loss alone."""

    compares = True

    def totals(self, parts: Sequence[Part]) -> None:
        return None

    def between(self, rows: Embeddings, targets: Targets) -> dict[str, torch.Tensor]:
        return {"contrastive": contrastive_loss(rows.image, rows.text[:, 0], rows.logit_scale)}

    def within(self, rows: Embeddings, part: Part, totals: None) -> dict[str, torch.Tensor]:
        return {}


def open_accelerator(kind: str) -> Accelerator:
    """Join the others. Accelerate knows sharding for accelerators only: on processors it is told that it has one."""
    AcceleratorState._reset_state()  # a test before this one may have left its precision
    accelerator = Accelerator(kwargs_handlers=[ddp_arguments()])
    if kind == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
        )
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def parts(step: int, rank: int, world_size: int, num_parts: int) -> list[Part]:
    """The micro-batches of one process, of the same global batch for any number of processes and parts."""
    random = torch.Generator().manual_seed(step)
    images = torch.randint(256, (BATCH, 3, 16, 16), generator=random, dtype=torch.uint8)
    ids = torch.randint(1, 49, (BATCH, 1, 8), generator=random)
    ids[:, :, -1] = 49
    mine = [tensor.chunk(world_size)[rank].chunk(num_parts) for tensor in (images, ids)]
    return [Part((image, text), Targets(None)) for image, text in zip(*mine, strict=True)]


def main(kind: str, num_parts: int, out: Path, start: str) -> None:
    accelerator = open_accelerator(kind)
    torch.manual_seed(0)
    model = build_dual_encoder(DualEncoderConfig(embed_dim=16, image=IMAGE, text=TEXT), (0.5,) * 3, (0.5,) * 3)
    make_shardable(accelerator, model)
    optimizers = build_optimizers(model, OptimConfig(name=os.environ.get("OPTIMIZER", "adamw"), lr=1e-3))
    wrapped, *prepared = accelerator.prepare(model, *optimizers)
    if start:
        model.load_state_dict(shard_state(load_file(f"{start}/model.safetensors"), model.state_dict()))
        restore_state(optimizers, shard_optimizer_state(load_file(f"{start}/optimizer.safetensors"), optimizers))
    steps = []
    for step in range(0 if start else STEPS):
        micro_batches = parts(step, accelerator.process_index, accelerator.num_processes, num_parts)
        result = train_step(
            accelerator, wrapped, prepared, Contrastive(), micro_batches, clip_norm=0.5, refuse=lambda loss, norm: None
        )
        model.clamp_logit_scale()
        steps.append([result.loss, result.grad_norm])
    states = {"model": full_state(model.state_dict()), "optimizer": full_state(flatten_state(optimizers))}
    if accelerator.is_main_process:
        out.mkdir()
        for name, tensors in states.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / f"{name}.safetensors")
        cut = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
        (out / "steps.json").write_text(json.dumps({"steps": steps, "cut": cut}))
    accelerator.wait_for_everyone()  # a process that leaves while others still write would break their connections
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "")
    # The sharded model still holds gloo, whose threads can abort a process that takes its interpreter down (1 in 60).
    os._exit(0)
