"""One process of the loss over several: python gloo_rank.py RANK FOLDER, four of them at once; not a test itself.

Reads FOLDER/rows.safetensors, scores this rank's share of the rows among four processes and then, on ranks 0 and 1,
among two, and writes loss and gradients to FOLDER/WORLD-CASE-RANK.safetensors.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mmvit.losses import contrastive
from mmvit.losses.gather import gather_rows


def gather_without_gradient(rows: torch.Tensor) -> torch.Tensor:
    return gather_rows(rows.detach())


def score(rank: int, world_size: int, rows: dict[str, torch.Tensor], grouped: bool) -> dict[str, torch.Tensor]:
    mine = {name: value.chunk(world_size)[rank].clone() for name, value in rows.items() if name != "logit_scale"}
    image, text = mine["image"].requires_grad_(), mine["text"].requires_grad_()
    scale = rows["logit_scale"].clone().requires_grad_()
    loss = contrastive.contrastive_loss(image, text, scale, mine["groups"] if grouped else None)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "logit_scale": scale.grad}


def main(rank: int, folder: Path) -> None:
    rows = load_file(folder / "rows.safetensors")
    for world_size in (4, 2):
        if rank >= world_size:
            break
        store = f"file://{folder}/store-{world_size}"
        dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world_size)
        save_file(score(rank, world_size, rows, grouped=False), folder / f"{world_size}-plain-{rank}.safetensors")
        save_file(score(rank, world_size, rows, grouped=True), folder / f"{world_size}-groups-{rank}.safetensors")
        contrastive.gather_rows = gather_without_gradient
        save_file(score(rank, world_size, rows, grouped=False), folder / f"{world_size}-detached-{rank}.safetensors")
        contrastive.gather_rows = gather_rows
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
