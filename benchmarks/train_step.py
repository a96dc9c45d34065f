"""Measures one training step against open_clip's on the same weights, images and captions.

    python benchmarks/train_step.py                             the quickstart-size model and ViT-B/32
    python benchmarks/train_step.py small --rounds 9            one model
    python benchmarks/train_step.py small --sides "mmvit fp32"  some sides, always with open_clip in fp32
    python benchmarks/train_step.py --out results.json          also write the figures

Each side is a process of its own. They take their steps in turn, A B C A B C ..., and the ratio is taken within each
round. Captions have 6 to 13 tokens: open_clip pads them to 77, mmvit cuts them to the longest of the batch, which
cannot change a causal tower's result. Losses of the first steps are compared: all sides train the same model.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from report import spread, write_report

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
BASELINE = "open_clip fp32"
SIDES = {  # side -> library, precision, compiled
    BASELINE: ("open_clip", "fp32", False),
    "mmvit fp32": ("mmvit", "fp32", False),
    "open_clip bf16 autocast": ("open_clip", "bf16", False),
    "mmvit bf16": ("mmvit", "bf16", False),
    "mmvit bf16 compiled": ("mmvit", "bf16", True),
    "open_clip bf16 compiled": ("open_clip", "bf16", True),
}
Step = Callable[[], float]


def main() -> None:
    """Measure the requested models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="samples of a step; default: what suits model and device")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: all that the device computes in hardware")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "SIDE", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, side, batch = options.worker
        serve_steps(name, side, int(batch))
        return
    device = this_device()
    rows = []
    for name in options.models or MODELS:
        usual = MODELS[name][2 if device.type == "cuda" else 1]
        batch = usual if options.batch is None else options.batch
        rows += compare(name, options.sides or sides_of(device), batch, options.rounds)
    if options.out:
        write_report(options.out, {"rows": rows}, ["open_clip_torch", "accelerate"])


def this_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sides_of(device: torch.device) -> list[str]:
    """Return the sides whose precision the device has units for; open_clip is compiled on GPUs only."""
    units, gpu = has_bf16_units(device), device.type == "cuda"
    wanted = {"open_clip": gpu, "mmvit": True}
    return [
        side
        for side, (library, precision, compiled) in SIDES.items()
        if (units or precision == "fp32") and (wanted[library] or not compiled)
    ]


class Worker:
    """A process that holds one side and takes a step when asked."""

    def __init__(self, name: str, side: str, batch: int):
        command = [sys.executable, __file__, "--worker", name, side, str(batch)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.losses, self.peak_mib = self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def answer(self) -> Any:
        """Return the next line that the process prints; exits if the process has failed."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the side ended with exit code {self.process.wait()}: {' '.join(self.process.args)}")
        return json.loads(line)

    def seconds(self) -> float:
        """Return the time of one more step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.answer())


def serve_steps(name: str, side: str, batch: int) -> None:
    """Take the first steps, print losses and peak memory, then time a step for each line of standard input."""
    device, before = this_device(), most_held()
    step = build(name, *SIDES[side], device=device, batch=batch)
    losses = [step() for _ in range(NUM_LOSSES)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else most_held() - before
    print(json.dumps([losses, peak]), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


def most_held() -> float:
    """Return the peak memory of this process, MiB; `getrusage` would include that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def compare(name: str, sides: list[str], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Measure the sides of one model in turn; return and print a row for each."""
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(name, side, batch)) for side in dict.fromkeys([BASELINE, *sides])}
        seconds: dict[str, list[float]] = {side: [] for side in workers}
        for _ in range(rounds):
            for side, worker in workers.items():
                seconds[side].append(worker.seconds())
    rows = []
    for side, worker in workers.items():
        rows.append(
            {
                "model": name,
                "side": side,
                "batch": batch,
                "pairs_per_s": batch / statistics.median(seconds[side]),
                "ratio": spread(seconds[BASELINE], seconds[side]),
                "peak_mib": worker.peak_mib,
                "loss_apart": max(abs(a - b) for a, b in zip(worker.losses, workers[BASELINE].losses, strict=True)),
            }
        )
        print(row_text(rows[-1]), flush=True)
    return rows


def row_text(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    return (
        f"{row['model']:9} {row['side']:24} batch {row['batch']}: {row['pairs_per_s']:8.1f} pairs/s, "
        "x{median:.2f} of open_clip fp32 ({least:.2f} to {greatest:.2f}), ".format(**row["ratio"])
        + f"peak {row['peak_mib']:.0f} MiB, losses within {row['loss_apart']:.1e}"
    )


def build(name: str, library: str, precision: str, compiled: bool, device: torch.device, batch: int) -> Step:
    """Return a training step; all libraries get the same weights and the same batch."""
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
    images, ids = some_batch(batch, size)
    if library == "open_clip":
        return open_clip_step(theirs, images.to(device), ids.to(device), precision, compiled)
    image = ViTConfig(image_size=size, patch_size=patch, width=width, depth=depth, num_heads=width // 64)
    words = TextConfig(
        vocab_size=VOCAB,
        context_length=CONTEXT,
        end_of_text=VOCAB - 1,
        width=text_width,
        depth=text_depth,
        num_heads=text_heads,
    )
    ours = build_dual_encoder(DualEncoderConfig(embed_dim=embed, image=image, text=words))
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
    """Return a step as open_clip's training loop takes it by default; its loader has normalised the images."""
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
    """Return a step as a run takes it: texts are cut to the longest of the batch."""
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


if __name__ == "__main__":
    main()
