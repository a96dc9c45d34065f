"""Metrics of the log: throughput, truncated captions, memory, and the norm of the parameters."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor


class Throughput:
    """Throughput since the last reading, without pauses."""

    def __init__(self) -> None:
        self.samples = 0
        self.flops = self.waited = 0.0
        self.since = time.perf_counter()
        self.paused_at: float | None = None

    def count(self, samples: int, flops: float = 0.0) -> None:
        """Add the samples and the floating-point operations of a step."""
        self.samples += samples
        self.flops += flops

    def wait(self, seconds: float) -> None:
        """Add time that was spent waiting for batches."""
        self.waited += seconds

    def numbers(self, peak_flops: float | None = None) -> dict[str, float]:
        """Return the throughput to log and reset it; `peak_flops` is the peak rate of all devices together."""
        now = time.perf_counter() if self.paused_at is None else self.paused_at
        elapsed = max(now - self.since, 1e-9)
        numbers = {"samples_per_s": self.samples / elapsed, "data_wait": min(self.waited / elapsed, 1.0)}
        if self.flops:
            numbers["tflops"] = self.flops / elapsed / 1e12
            if peak_flops:
                numbers["mfu"] = self.flops / elapsed / peak_flops
        self.samples, self.flops, self.waited, self.since = 0, 0.0, 0.0, now
        return numbers

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block; a reading within it ends at its start."""
        self.paused_at = time.perf_counter()
        yield
        self.since += time.perf_counter() - self.paused_at
        self.paused_at = None


class CutCaptions:
    """The fraction of captions that were truncated to the length of the text tower, since the last reading."""

    def __init__(self) -> None:
        self.cut = self.seen = 0

    def count(self, cut: int, seen: int) -> None:
        """Add the captions of a step."""
        self.cut += cut
        self.seen += seen

    def share(self) -> float:
        """Return the fraction and reset it."""
        share = self.cut / max(self.seen, 1)
        self.cut = self.seen = 0
        return share


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this rank so far, MiB: on the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def parameter_norm(model: torch.nn.Module) -> float:
    """Return the Euclidean norm of all parameters together; all ranks must call this if they are sharded."""
    norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in model.parameters()])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
