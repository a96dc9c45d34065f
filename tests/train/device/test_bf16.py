"""bfloat16 parameters with float32 masters train as float32 does; without masters they stand still."""

import pytest
import torch
from torch import Tensor, nn

from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.device.bf16 import Bf16Copy

SMALL_RATE = 1e-4  # steps of 1e-4 of a weight of 1: bfloat16 resolves 4e-3 there


def teacher_task() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(64, 8, generator=generator)
    return inputs, (inputs @ torch.randn(8, 4, generator=generator)).tanh()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))


def fit(kind: str, num_steps: int = 50, lr: float = 0.01) -> list[float]:
    """Train in float32, in bfloat16 with masters, or in bfloat16 alone; returns the losses."""
    inputs, targets = teacher_task()
    model, losses = network(), []
    low = Bf16Copy(model) if kind == "masters" else None
    working = low.model if low else (model.bfloat16() if kind == "alone" else model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(num_steps):
        loss = (working(inputs.to(next(working.parameters()).dtype)).float() - targets).square().mean()
        loss.backward()
        if low:
            low.pull_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if low:
            low.push_weights()
        losses.append(loss.item())
    return losses


def test_it_follows_the_float32_run():
    exact, masters = fit("fp32"), fit("masters")
    assert masters[-1] < 0.2 * masters[0]
    assert masters[-1] == pytest.approx(exact[-1], rel=0.1)
    assert max(abs(a - b) for a, b in zip(exact, masters, strict=True)) < 0.01


def test_small_updates_are_kept_by_the_masters_and_lost_without_them():
    exact, masters, alone = (fit(kind, num_steps=150, lr=SMALL_RATE) for kind in ("fp32", "masters", "alone"))
    fall = exact[0] - exact[-1]
    assert masters[0] - masters[-1] == pytest.approx(fall, rel=0.1)
    assert alone[0] - alone[-1] < 0.7 * fall


def test_one_small_update_is_in_the_master_only():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    low = Bf16Copy(model)
    for step in range(1, 65):
        with torch.no_grad():
            model.weight += 2**-12
        low.push_weights()
        assert model.weight.item() == 1 + step * 2**-12
        assert low.model.weight.item() == torch.tensor(1 + step * 2**-12).bfloat16().item()
    assert low.model.weight.item() == 1 + 2**-6  # 64 of them do arrive


def dual_encoder(**options: object) -> DualEncoder:
    torch.manual_seed(0)
    image = ViTConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2, **options)
    text = TextConfig(vocab_size=50, end_of_text=49, context_length=8, width=32, depth=1, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(24, initial_logit_bias=-10.0, image=image, text=text))


@pytest.mark.parametrize("options", [{}, {"pool": "attention", "stem_channels": [4, 8, 16]}], ids=["plain", "hybrid"])
def test_a_dual_encoder_runs_in_bfloat16_and_its_masters_get_float32_gradients(options: dict):
    model = dual_encoder(**options)
    low = Bf16Copy(model)
    kinds = {name: parameter.dtype for name, parameter in low.model.named_parameters()}
    scalars = {"logit_scale", "logit_bias"}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == scalars
    assert {kinds[name] for name in kinds.keys() - scalars} == {torch.bfloat16}
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    ids = torch.tensor([[[1, 7 + i, 49]] for i in range(4)])
    gradients = []
    for encoder in (model, low.model):
        found = encoder(images, ids)
        logits = found.logit_scale * found.image @ found.text[:, 0].T + found.logit_bias
        nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        if encoder is low.model:
            assert all(p.grad is None for p in model.parameters())
            low.pull_gradients()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert all(p.grad is None for p in low.model.parameters())
    for name, exact in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        if exact.norm() > 1e-4:  # that of the key's bias is zero, but for rounding
            assert (gradients[1][name] - exact).norm() < 0.1 * exact.norm(), name


def test_gradients_pulled_twice_add_up_as_those_of_two_backward_passes():
    model = nn.Linear(2, 1, bias=False)
    low = Bf16Copy(model)
    for value in (1.0, 2.0**-10):  # their sum is no bfloat16
        low.model(torch.full((1, 2), value).bfloat16()).sum().backward()
        low.pull_gradients()
    assert torch.equal(model.weight.grad, torch.full((1, 2), 1 + 2**-10))


def test_frozen_parameters_stay_frozen_and_get_no_gradient():
    model = network()
    model[0].requires_grad_(False)
    low = Bf16Copy(model)
    low.model(teacher_task()[0].bfloat16()).sum().backward()
    low.pull_gradients()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]


def test_masters_alone_bring_back_the_same_bfloat16_weights():
    torch.manual_seed(3)
    model = network()
    low = Bf16Copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    low.push_weights()
    again = network()
    resumed = Bf16Copy(again)
    again.load_state_dict(model.state_dict())
    assert not torch.equal(resumed.model[0].weight, low.model[0].weight)
    resumed.push_weights()
    for found, expected in zip(resumed.model.parameters(), low.model.parameters(), strict=True):
        assert torch.equal(found, expected)
