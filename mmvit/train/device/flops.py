"""The floating-point operations of a training step, and the peak rate of the device."""

import copy
import itertools
import math
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmvit.layers.patch_embedding import Patches
from mmvit.models.dual_encoder import DualEncoder
from mmvit.train.device.memory import checkpoint_activations

# Dense peaks in 1e12 operations a second: bfloat16 with float32 sums, TF32, float32 without tensor cores. Sources: the
# data sheets of NVIDIA, whose figures "with sparsity" are halved here, and for GeForce the white papers of GA102,
# AD102 and GB202. The first entry whose name is part of the device name is used.
GPU_PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "H800": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A800": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.0, 10.3),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.1, 183.0, 91.6),
    "L40": (181.1, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    "RTX A6000": (154.8, 77.4, 38.7),
}


class FlopCounter:
    """Counts the operations of one training sample: matrix products, convolutions, attention, forward and backward.

    Gradients of frozen parameters are not counted. Neither are the loss (under 1 % of the towers), the optimizer, and
    recomputation by checkpointed blocks and micro-batches, so that the ratio to the peak is the model FLOPs
    utilization (Chowdhery et al. 2022, appendix B). Causal attention counts in full, as is usual. Create the counter
    before the model is sharded; it keeps a copy without weights.
    """

    def __init__(self, model: nn.Module):
        tensors = itertools.chain(model.parameters(), model.buffers())
        self.model = copy.deepcopy(model, {id(tensor): _without_data(tensor) for tensor in tensors})
        self.model.eval()  # BatchNorm would want more than one value
        checkpoint_activations(self.model, "none")
        self.lengths = [0]  # of no texts
        if isinstance(model, DualEncoder):
            longest = cast(int, model.text_tower.context_length)
            self.lengths = sorted({2, (2 + longest) // 2, longest})
        self.known: dict[tuple[Any, ...], list[float]] = {}

    def sample_flops(self, images: Tensor | Patches, ids: Tensor | None, keep: Tensor | None = None) -> float:
        """Return the operations for each of the b samples of these model inputs; counts are cached by shape.

        They are a quadratic polynomial of the text length: it is fitted to three lengths. Without `ids` the model takes
        images only.
        """
        shapes = (
            *(tensor.shape[1:] for tensor in _flat(images)),
            None if ids is None else ids.shape[1],
            None if keep is None else keep.shape[1],
        )
        if shapes not in self.known:
            views = None if ids is None else ids.shape[1]
            texts = [None if views is None else torch.zeros(1, views, n, dtype=torch.long) for n in self.lengths]
            self.known[shapes] = [self._count(images, each, keep) for each in texts]
        return _through(self.lengths, self.known[shapes], 0 if ids is None else ids.shape[2])

    def _count(self, images: Tensor | Patches, ids: Tensor | None, keep: Tensor | None) -> float:
        if isinstance(images, Patches):  # a strip of as many patches costs the same, and needs no real sizes
            side = cast(int, self.model.image_tower.stride)
            images = torch.empty(1, 3, side, side * images.pixels.shape[1], dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            inputs = [images, *([] if ids is None else [ids]), keep]
            outputs = self.model(*(None if each is None else each[:1].to("meta") for each in inputs))
            torch.stack([output.sum() for output in outputs if output is not None]).sum().backward()
        self.model.zero_grad()
        return float(counter.get_total_flops())


def _through(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """Evaluate the Lagrange interpolation polynomial through the points at `at`."""
    weights = [math.prod((at - other) / (point - other) for other in points if other != point) for point in points]
    return float(round(sum(weight * value for weight, value in zip(weights, values, strict=True))))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak operations per second of the device; None if unknown.

    For a GPU it is the figure of the data sheet, for a CPU the rate of a large matrix product, measured in 0.2 s.
    """
    if device.type == "cpu":
        return _measured_peak(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    column = 0 if dtype == torch.bfloat16 else 1 if torch.get_float32_matmul_precision() != "highest" else 2
    return next((peaks[column] * 1e12 for part, peaks in GPU_PEAKS.items() if part in name), None)


@cache
def _measured_peak(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    fastest, until = float("inf"), time.perf_counter() + seconds
    a @ b
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _flat(images: Tensor | Patches) -> tuple[Tensor, ...]:
    return (images,) if isinstance(images, Tensor) else images
