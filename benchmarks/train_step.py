"""Measures one training step against open_clip's on the same weights, images and captions.

    python benchmarks/train_step.py                             the quickstart-size model and ViT-B/32
    python benchmarks/train_step.py small --rounds 9            one model
    python benchmarks/train_step.py --out results.json          also write the figures

Sides run in turn, A B C A B C ..., in one process; the ratio is taken within each round. Peak memory comes from a
process of its own for each side. Captions have 6 to 13 tokens: open_clip pads them to 77, mmvit cuts them to the
longest of the batch, which cannot change a causal tower's result. Losses of the first steps are compared: all sides
train the same model.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from open_clip.model import CLIP

from mmvit.config import LossConfig, OptimConfig
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.interop.open_clip import from_open_clip
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.contract import Part
from mmvit.train.device.precision import has_bf16_units
from mmvit.train.optim.build import build_optimizers
from mmvit.train.runs.pretraining_loss import PretrainObjective, Targets
from mmvit.train.step import train_step

VOCAB, CONTEXT = 49408, 77
# embed_dim, image: size px, depth, width, patch px; text: depth, width, heads; batch on a CPU, batch on a GPU
MODELS = {
    "small": ((256, (48, 4, 192, 8), (2, 128, 2)), 256, 4096),
    "ViT-B-32": ((512, (224, 12, 768, 32), (12, 512, 8)), 16, 1024),
}
LENGTHS = range(6, 14)  # tokens of a caption
NUM_LOSSES = 3
Step = Callable[[], float]


def main() -> None:
    """Run what was asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_memory(*options.memory_of))
        return
    rows = [row for name in options.models or MODELS for row in compare(name, options.rounds)]
    if options.out:
        versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "python": platform.python_version()}
        facts = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions, "rows": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


def sides(device: torch.device) -> dict[str, tuple[str, str, bool]]:
    """Return what is measured on this device: side -> (library, precision, compiled)."""
    found = {"open_clip fp32": ("open_clip", "fp32", False), "mmvit fp32": ("mmvit", "fp32", False)}
    if has_bf16_units(device):
        found["open_clip bf16 autocast"] = ("open_clip", "bf16", False)
        found["mmvit bf16"] = ("mmvit", "bf16", False)
        found["mmvit bf16 compiled"] = ("mmvit", "bf16", True)
    if device.type == "cuda":
        found["open_clip bf16 compiled"] = ("open_clip", "bf16", True)
    return found


def compare(name: str, rounds: int) -> list[dict[str, Any]]:
    """Measure all sides of one model in turn; returns and prints a row for each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = batch_size(name, device)
    steps = {side: build(name, *made, device=device) for side, made in sides(device).items()}
    losses = {side: [step() for _ in range(NUM_LOSSES)] for side, step in steps.items()}
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(rounds):
        for side, step in steps.items():
            seconds[side].append(timed(step, device))
    rows = []
    for side, times in seconds.items():
        ratios = sorted(theirs / own for theirs, own in zip(seconds["open_clip fp32"], times, strict=True))
        memory = float(subprocess.check_output([sys.executable, __file__, "--memory-of", name, side], text=True))
        apart = max(abs(a - b) for a, b in zip(losses[side], losses["open_clip fp32"], strict=True))
        row = {
            "model": name,
            "side": side,
            "batch": batch,
            "pairs_per_s": batch / statistics.median(times),
            "ratio": statistics.median(ratios),
            "least": ratios[0],
            "greatest": ratios[-1],
            "peak_mib": memory,
            "loss_apart": apart,
        }
        rows.append(row)
        print(
            "{model:9} {side:24} batch {batch}: {pairs_per_s:8.1f} pairs/s, x{ratio:.2f} of open_clip fp32 "
            "({least:.2f} to {greatest:.2f}), {peak_mib:.0f} MiB beyond start, losses within {loss_apart:.1e}".format(
                **row
            ),
            flush=True,
        )
    return rows


def batch_size(name: str, device: torch.device) -> int:
    """Return the batch that fits the device."""
    return MODELS[name][2 if device.type == "cuda" else 1]


def timed(step: Step, device: torch.device) -> float:
    """Return the seconds of a step."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(name: str, side: str) -> float:
    """Return the MiB that three steps of one side need beyond what importing did; for a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = most_held()
    step = build(name, *sides(device)[side], device=device)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else most_held() - before


def most_held() -> float:
    """Return the MiB that this process held at most; `getrusage` would begin with what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def build(name: str, library: str, precision: str, compiled: bool, device: torch.device) -> Step:
    """Return a training step on the same weights and the same batch, whatever the library."""
    embed, (size, depth, width, patch), (text_depth, text_width, text_heads) = MODELS[name][0]
    torch.manual_seed(0)
    vision = {"image_size": size, "layers": depth, "width": width, "patch_size": patch}
    text = {
        "context_length": CONTEXT,
        "vocab_size": VOCAB,
        "width": text_width,
        "heads": text_heads,
        "layers": text_depth,
    }
    theirs = CLIP(embed, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).to(device)
    images, ids = some_batch(batch_size(name, device), size)
    if library == "open_clip":
        return open_clip_step(theirs, images.to(device), ids.to(device), precision, compiled)
    image = ViTConfig(size, patch, width, depth, width // 64)
    words = TextConfig(VOCAB, CONTEXT, VOCAB - 1, text_width, text_depth, text_heads)
    ours = build_dual_encoder(DualEncoderConfig(embed, image=image, text=words))
    ours.load_state_dict(from_open_clip(theirs.state_dict()))
    return mmvit_step(ours.to(device), images, ids, precision, compiled)


def some_batch(size: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 images and ids of 6 to 13 tokens, padded to the context length."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    ids = torch.zeros(size, CONTEXT, dtype=torch.long)
    for row in ids:
        length = int(torch.randint(LENGTHS.start, LENGTHS.stop, (1,), generator=generator))
        row[:length] = torch.randint(1, VOCAB - 2, (length,), generator=generator)
        row[0], row[length - 1] = VOCAB - 2, VOCAB - 1
    return images, ids


def open_clip_step(model: CLIP, images: torch.Tensor, ids: torch.Tensor, precision: str, compiled: bool) -> Step:
    """A step as open_clip's training loop takes it by default, its floats normalised by the loader."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=images.device).view(3, 1, 1)
    floats = (images / 255 - mean) / std
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    loss_function = ClipLoss()
    run = torch.compile(model) if compiled else model

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            image, text, scale = run(floats, ids)[:3]
            loss = loss_function(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss.item()

    return step


def mmvit_step(model: torch.nn.Module, images: torch.Tensor, ids: torch.Tensor, precision: str, compiled: bool) -> Step:
    """A step as a run takes it: texts cut to the longest of the batch."""
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=images.device.type == "cpu")
    if compiled:
        from mmvit.train.device.memory import compile_blocks

        compile_blocks(model)
    optimizers = build_optimizers(model, OptimConfig())
    wrapped, *optimizers = accelerator.prepare(model, *optimizers)
    tokenizer = build_tokenizer(TokenizerConfig("clip"), CONTEXT)
    objective = PretrainObjective(LossConfig(), None, same_caption_positives=False, tokenizer=tokenizer)
    longest = int((ids != 0).sum(dim=1).max())
    inputs = images.to(accelerator.device), ids[:, None, :longest].to(accelerator.device)
    part = Part(inputs, Targets(None))

    def step() -> float:
        result = train_step(accelerator, wrapped, optimizers, objective, [part], clip_norm=None, refuse=lambda *_: None)
        model.clamp_logit_scale()
        return result.loss

    return step


def machine() -> str:
    """Name what the figures belong to."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
