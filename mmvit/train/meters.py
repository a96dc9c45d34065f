"""The metrics of a run between two lines of its log."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from mmvit.data.batches import Batch
from mmvit.train.contract import StepResult
from mmvit.train.device.flops import peak_flops
from mmvit.train.optim.schedule import schedule_factor
from mmvit.train.record.figures import CutCaptions, Throughput, parameter_norm, peak_memory
from mmvit.train.run import Run


class Meters:
    """Collects the figures of the steps of a run for the lines of its log."""

    def __init__(self, run: Run):
        self.run = run
        self.throughput = Throughput()
        self.captions = CutCaptions()
        dtype = torch.float32 if run.identity["precision"] == "no" else torch.bfloat16
        peak = peak_flops(run.accelerator.device, dtype)
        self.peak = peak and peak * run.accelerator.num_processes

    def count(self, step: int, parts: Sequence[Batch]) -> None:
        """Add the step with this number, from 0, on these micro-batches."""
        samples = self.run.config.train.batch_size
        flops = self.run.flops.sample_flops(*self.run.task.flop_inputs(step, parts[0]))
        self.throughput.count(samples, samples * flops)
        for part in parts:
            self.captions.count(part.num_cut, part.ids.shape[0] * part.ids.shape[1])

    def numbers(self, step: int, result: StepResult, waited_s: float) -> dict[str, Any]:
        """Return the values to log after this step, counted from 0; all ranks must call this."""
        run = self.run
        device = run.accelerator.device
        cut = run.accelerator.reduce(torch.tensor(self.captions.share(), device=device), "mean").item()
        self.throughput.wait(waited_s)
        parts = result.losses if len(result.losses) > 1 else {}
        return {
            "loss": finite(result.loss),
            **{f"loss_{name}": finite(value) for name, value in parts.items()},
            **({"cut_captions": cut} if cut else {}),
            "grad_norm": finite(result.grad_norm),
            "param_norm": parameter_norm(run.model),
            **(run.task.figures() if run.task.figures else {}),
            "lr": schedule_factor(step, run.config.train.steps, run.config.optim) * run.config.optim.lr,
            **({"skipped_steps": run.guard.skipped} if run.guard.skipped else {}),
            **self.throughput.numbers(self.peak),
            "memory_mib": round(peak_memory(device), 1),
        }


def finite(value: float) -> float | None:
    """Return the value, or None if it is not finite, which JSON cannot represent."""
    return value if math.isfinite(value) else None
