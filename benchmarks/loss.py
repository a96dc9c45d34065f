"""Measures the exact softmax loss with its gradients against open_clip's ClipLoss: time and memory, interleaved.

    python benchmarks/loss.py                                  32,768 pairs of 512; open_clip takes 17 GiB
    python benchmarks/loss.py --pairs 8192 --out results.json  a smaller batch; also write the figures

Each measurement is a process of its own: A B A B ... Memory is the peak beyond the embeddings, both gradients included.
On a shared machine compare the CPU seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import spread, write_report
from safetensors.torch import load_file, save_file

MIB, GIB = 2**20, 2**30
SIDES = ("mmvit", "open_clip")
FIGURES = ("seconds", "cpu_seconds", "memory_mib")
SCALE = 14.3


def measure(side: str, pairs: int, width: int, out: Path) -> None:
    """Compute loss and gradients once; write them to `out` and print time and memory."""
    if side == "mmvit":
        from mmvit.losses.contrastive import contrastive_loss as loss_function
    else:
        from open_clip.loss import ClipLoss

        loss_function = ClipLoss()
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(pairs, width, generator=generator) for _ in range(2))
    text = F.normalize(image + 2 * noise, dim=1).requires_grad_()  # pairs are nearer than non-pairs, as in training
    image = F.normalize(image, dim=1).requires_grad_()
    del noise
    scale = torch.tensor(SCALE, requires_grad=True)
    warm = [tensor.detach()[:256].clone().requires_grad_() for tensor in (image, text)]
    loss_function(*warm, scale).backward()
    scale.grad = None

    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, start, start_cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    loss = loss_function(image, text, scale)
    loss.backward()
    memory = (status("VmHWM") - before) / MIB
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    save_file({"loss": loss.detach(), "image": image.grad, "text": text.grad, "logit_scale": scale.grad}, out)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "memory_mib": memory}))


def status(name: str, of: str = "self/status") -> int:
    """Return an entry of a file of /proc, in bytes."""
    lines = Path("/proc", of).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run(side: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--pairs", str(options.pairs), "--width", str(options.width)]
    command += ["--side", side, "--out", str(folder / f"{side}.safetensors")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(options.side, options.pairs, options.width, options.out)
        return
    needed = 4.2 * 4 * options.pairs**2  # four matrices of logits, and a little
    free = status("MemAvailable", "meminfo")
    if needed > free:
        sys.exit(f"open_clip's side needs {needed / GIB:.1f} GiB and {free / GIB:.1f} are free: choose fewer --pairs")
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for side in SIDES:
                figures[side].append(run(side, options, Path(folder)))
                print(side, figures[side][-1], flush=True)
        ours, theirs = (load_file(Path(folder, f"{side}.safetensors")) for side in SIDES)
    report = summary(options, figures)
    report["largest_difference"] = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    report["relative_difference"] = {
        name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours
    }
    print(report_text(report))
    if options.out:
        write_report(options.out, report, ["open_clip_torch"])


def summary(options: argparse.Namespace, figures: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    report: dict[str, Any] = {"pairs": options.pairs, "width": options.width, "rounds": figures}
    for side in SIDES:
        report[side] = {name: statistics.median(figure[name] for figure in figures[side]) for name in FIGURES}
    for name in FIGURES:
        ours, theirs = ([figure[name] for figure in figures[side]] for side in SIDES)
        report[f"ratio_{name}"] = spread(theirs, ours)
    return report


def report_text(report: dict[str, Any]) -> str:
    lines = [f"\n{report['pairs']:,} pairs of {report['width']}, loss and gradients; medians of the rounds"]
    lines.append(f"{'':12} {'seconds':>18} {'CPU seconds':>18} {'peak MiB':>18}")
    for side in SIDES:
        lines.append(f"{side:12}" + "".join(f"{report[side][name]:19,.2f}" for name in FIGURES))
    ratios = [report[f"ratio_{name}"] for name in FIGURES]
    for which in ("median", "least", "greatest"):
        lines.append(f"{'ratio, ' + which:16}" + "".join(f"{ratio[which]:15,.2f} ".rjust(19) for ratio in ratios))
    for name, difference in report["relative_difference"].items():
        largest = report["largest_difference"][name]
        lines.append(f"{name:12} differs by {difference:.1e} of its size, at most {largest:.1e}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
