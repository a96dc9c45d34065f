"""Counted operations equal the formula; the peak of a device is a plausible one."""

import pytest
import torch

from mmvit.config import LoraConfig
from mmvit.layers.patch_embedding import Patches
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.device.flops import FlopCounter, peak_flops
from mmvit.train.device.memory import checkpoint_activations
from mmvit.train.start.freeze import freeze
from mmvit.train.start.lora import add_adapters

DIM, DEPTH, IMAGE_WIDTH, TEXT_WIDTH = 64, 2, 96, 48


def build(depth: int = DEPTH) -> DualEncoder:
    image = ViTConfig(image_size=32, patch_size=8, width=IMAGE_WIDTH, depth=depth, num_heads=2, pool="mean")
    text = TextConfig(vocab_size=100, context_length=16, end_of_text=99, width=TEXT_WIDTH, depth=depth, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(embed_dim=DIM, image=image, text=text))


def inputs(size: int = 32, length: int = 10, views: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(5, 3, size, size, dtype=torch.uint8), torch.full((5, views, length), 99)


def blocks(num_tokens: int, width: int) -> int:
    """One forward pass through the blocks: 12 D^2 weights a token, and two products for the attention."""
    return DEPTH * (2 * num_tokens * 12 * width**2 + 2 * 2 * num_tokens**2 * width)


def forward(num_patches: int = 16, length: int = 10, views: int = 1) -> int:
    image = blocks(num_patches, IMAGE_WIDTH) + 2 * IMAGE_WIDTH * DIM
    return image + views * (blocks(length, TEXT_WIDTH) + 2 * TEXT_WIDTH * DIM)


def patches(num_patches: int = 16) -> int:
    return 2 * num_patches * 8 * 8 * 3 * IMAGE_WIDTH


def test_step_is_three_forward_passes():
    counter = FlopCounter(build())
    # no gradient goes on into the pixels
    assert counter.sample_flops(*inputs()) == 3 * forward() + 2 * patches()
    larger = 3 * forward(64, 7, 2) + 2 * patches(64)
    resampling = 0.002 * larger  # of the positions, which a batch needs once
    assert counter.sample_flops(*inputs(size=64, length=7, views=2)) == pytest.approx(larger, abs=resampling)


def test_figure_of_clip_b32_is_the_published_one():
    """open_clip's table of models says 14.78 GFLOP forward."""
    with torch.device("meta"):
        model = build_dual_encoder(DualEncoderConfig())
    images, ids = torch.zeros(1, 3, 224, 224, dtype=torch.uint8), torch.full((1, 1, 77), 49407)
    assert FlopCounter(model).sample_flops(images, ids) == pytest.approx(3 * 14.78e9, rel=0.006)


def test_dropped_patches_cost_nothing_beyond_their_embedding():
    keep = torch.arange(4).expand(5, 4)
    assert FlopCounter(build()).sample_flops(*inputs(), keep) == 3 * forward(num_patches=4) + 2 * patches()


def test_patches_of_many_shapes_cost_as_much_as_an_image_of_so_many():
    packed = Patches(torch.zeros(5, 16, 192, dtype=torch.uint8), torch.tensor([[2, 8]] * 5))
    counter = FlopCounter(build())
    assert counter.sample_flops(packed, inputs()[1]) == pytest.approx(counter.sample_flops(*inputs()), rel=0.002)


def test_stored_embeddings_leave_the_text_tower():
    text = blocks(10, TEXT_WIDTH) + 2 * TEXT_WIDTH * DIM
    assert FlopCounter(build()).sample_flops(torch.zeros(5, DIM), inputs()[1]) == 3 * text


def test_frozen_tower_costs_its_forward_pass_alone():
    model = build()
    freeze(model, ["image_tower.*", "image_projection.*"])
    image = blocks(16, IMAGE_WIDTH) + 2 * IMAGE_WIDTH * DIM
    text = blocks(10, TEXT_WIDTH) + 2 * TEXT_WIDTH * DIM
    assert FlopCounter(model).sample_flops(*inputs()) == image + patches() + 3 * text


def test_adapters_save_the_gradients_of_the_matrices():
    model = build()
    whole = FlopCounter(model).sample_flops(*inputs())
    add_adapters(model, LoraConfig(rank=1, targets=["q", "v"]))
    assert 0.6 * whole < FlopCounter(model).sample_flops(*inputs()) < 0.8 * whole


def test_counting_takes_no_weights_and_leaves_the_model_alone():
    model = build()
    counter = FlopCounter(model)
    assert {parameter.device.type for parameter in counter.model.parameters()} == {"meta"}
    counter.sample_flops(*inputs())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_computed_again_counts_once():
    model = build()
    whole = FlopCounter(model).sample_flops(*inputs())
    checkpoint_activations(model, "full")
    assert FlopCounter(model).sample_flops(*inputs()) == whole


def test_known_shapes_are_not_counted_again(monkeypatch: pytest.MonkeyPatch):
    counter = FlopCounter(build())
    first = counter.sample_flops(*inputs())
    monkeypatch.setattr(counter, "model", None)
    images, ids = inputs()
    assert counter.sample_flops(images[:2], ids[:2]) == first


def test_peak_of_a_processor_is_measured():
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None
    assert 1e8 < peak < 1e14


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA L40S", torch.bfloat16, 362.1e12),
        ("NVIDIA GeForce GTX 1060", torch.bfloat16, None),
    ],
)
def test_peak_of_a_gpu_is_the_data_sheets(
    name: str, dtype: torch.dtype, peak: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == peak
