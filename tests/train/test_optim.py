"""Who updates what, with which decay and rate, and that a restored state goes on bit for bit."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from mmvit.config import OptimConfig
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.muon import Muon
from mmvit.train.optim import build_optimizers, flatten_state, restore_state, schedule_factor, set_learning_rates

BLOCK_MATRICES = {
    f"{tower}_tower.blocks.0.{part}.weight"
    for tower in ("image", "text")
    for part in ("attention.q", "attention.k", "attention.v", "attention.out", "feed_forward.up", "feed_forward.down")
}
PROJECTIONS = {"image_projection.weight", "text_projection.weight"}
EMBEDDINGS = {"image_tower.embed.projection.weight", "text_tower.token_embedding.weight"}
NEVER_DECAYED = {
    *("image_tower.positions", "image_tower.class_token", "text_tower.positions", "logit_scale"),
    *("image_tower.pre_norm.weight", "image_tower.norm.weight", "text_tower.norm.weight"),
    *("image_tower.blocks.0.attention_norm.weight", "text_tower.blocks.0.feed_forward_norm.weight"),
    *("image_tower.blocks.0.attention.q.bias", "text_tower.blocks.0.feed_forward.up.bias", "text_tower.norm.bias"),
}


def small_model(stem_channels: tuple[int, ...] = ()) -> DualEncoder:
    torch.manual_seed(0)
    image = ViTConfig(16, 8, 32, depth=1, num_heads=2, stem_channels=list(stem_channels))
    text = TextConfig(vocab_size=50, end_of_text=49, context_length=8, width=32, depth=1, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(24, image=image, text=text))


def members(model: DualEncoder, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_adamw_takes_all_and_decays_matrices_only():
    model = small_model()
    (adamw,) = build_optimizers(model, OptimConfig(weight_decay=0.3, betas=[0.8, 0.9], eps=1e-5, lr=0.1))
    decayed, plain = adamw.param_groups
    assert members(model, decayed) == BLOCK_MATRICES | PROJECTIONS | EMBEDDINGS
    assert members(model, plain) == {name for name, _ in model.named_parameters()} - members(model, decayed)
    assert members(model, plain) >= NEVER_DECAYED
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert (adamw.defaults["betas"], adamw.defaults["eps"], adamw.defaults["lr"]) == ((0.8, 0.9), 1e-5, 0.1)


def test_muon_takes_the_hidden_matrices():
    model = small_model()
    muon, adamw = build_optimizers(model, OptimConfig(name="muon", muon_lr=0.5, muon_weight_decay=0.07))
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    assert members(model, muon.param_groups[0]) == BLOCK_MATRICES | PROJECTIONS
    decayed, plain = adamw.param_groups
    assert members(model, decayed) == EMBEDDINGS
    assert members(model, plain) >= NEVER_DECAYED
    assert (muon.param_groups[0]["lr"], muon.param_groups[0]["weight_decay"]) == (0.5, 0.07)
    groups = [muon.param_groups[0], decayed, plain]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_takes_the_kernels_of_a_stem_that_do_not_read_pixels():
    model = small_model((4, 8, 16))
    muon, _ = build_optimizers(model, OptimConfig(name="muon"))
    kernels = {f"image_tower.embed.{part}.weight" for part in ("convolutions.3", "convolutions.6", "projection")}
    assert members(model, muon.param_groups[0]) == BLOCK_MATRICES | PROJECTIONS | kernels


def test_frozen_parameters_are_left_out():
    model = small_model()
    model.image_tower.requires_grad_(False)
    for optimizer in build_optimizers(model, OptimConfig(name="muon")):
        for group in optimizer.param_groups:
            assert not any(name.startswith("image_tower.") for name in members(model, group))


@pytest.mark.parametrize(
    ("decay", "share", "expected"),
    [
        ("cosine", 1.0, {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 0.5, 99: (1 + math.cos(math.pi * 89 / 90)) / 2, 100: 0.0}),
        ("linear", 1.0, {0: 1 / 11, 10: 1.0, 55: 0.5, 99: 1 / 90, 100: 0.0}),
        ("linear", 0.2, {5: 6 / 11, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
    ],
)
def test_schedule(decay: str, share: float, expected: dict[int, float]):
    config = OptimConfig(warmup_share=0.1, decay=decay, decay_share=share)
    assert {step: schedule_factor(step, 100, config) for step in expected} == pytest.approx(expected)


def test_rates_are_set_from_the_peak_each_time():
    optimizers = build_optimizers(small_model(), OptimConfig(name="muon", lr=0.1, muon_lr=0.4))
    for factor in (0.5, 0.25, 1.0):
        set_learning_rates(optimizers, factor)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * factor, 0.1 * factor, 0.1 * factor])


def train(model: DualEncoder, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rates(optimizers, schedule_factor(step, 8, OptimConfig()))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_state_goes_on_bit_for_bit(tmp_path: Path, name: str):
    config = OptimConfig(name=name)
    model = small_model((4, 8, 16))
    optimizers = build_optimizers(model, config)
    train(model, optimizers, range(3))
    save_file(flatten_state(optimizers), tmp_path / "optimizer.safetensors")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizers, range(3, 6))

    again, forgetful = small_model((4, 8, 16)), small_model((4, 8, 16))
    for copy in (again, forgetful):
        copy.load_state_dict(weights)
    restored = build_optimizers(again, config)
    restore_state(restored, load_file(tmp_path / "optimizer.safetensors"))
    train(again, restored, range(3, 6))
    train(forgetful, build_optimizers(forgetful, config), range(3, 6))
    for (key, expected), found, other in zip(
        model.named_parameters(), again.parameters(), forgetful.parameters(), strict=True
    ):
        assert torch.equal(found, expected), key
        assert not torch.equal(other, expected), key
