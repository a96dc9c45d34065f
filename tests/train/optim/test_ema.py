"""The average is the formula's, its state comes back whole or not at all, and the model gets its own weights back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_tools.core.errors import CheckpointError
from mmvit.train.optim.ema import EmaWeights


def tiny_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    model[0].bias.requires_grad_(False)
    return model


def walk(model: nn.Module, ema: EmaWeights, steps: range) -> None:
    """Random steps, a function of their numbers."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape, generator=generator)
        ema.update(step)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_it_is_the_formula_in_float64():
    model, decay = tiny_model(), 0.7
    ema = EmaWeights(model, decay)
    expected = model[0].weight.detach().double()
    constant = expected.clone()
    for step in range(40):
        walk(model, ema, range(step, step + 1))
        rise = min(decay, (1 + step) / (10 + step))
        expected = rise * expected + (1 - rise) * model[0].weight.detach().double()
        constant = decay * constant + (1 - decay) * model[0].weight.detach().double()
        found = ema.tensors()["0.weight"]
        assert (found - expected).abs().max() < 1e-5
        if step == 3:
            assert (found - constant).abs().max() > 0.1  # without the rise it is another average


def test_running_statistics_are_averaged_and_frozen_parameters_are_not():
    ema = EmaWeights(tiny_model(), 0.9)
    trained = {"0.weight", "1.weight", "1.bias", "2.weight"}
    assert ema.tensors().keys() == trained | {"1.running_mean", "1.running_var"}


def test_low_precision_weights_have_a_float32_average():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = EmaWeights(model, 0.999)
    with torch.no_grad():
        model.weight += 2**-7  # the next bfloat16
    for step in range(10_000, 10_010):
        ema.update(step)
    assert ema.tensors()["weight"].item() == pytest.approx(1 + 2**-7 * (1 - 0.999**10), abs=1e-6)
    with ema.in_place():
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 1 + 2**-7


def test_a_restored_ema_continues_bit_for_bit(tmp_path: Path):
    model = tiny_model()
    ema = EmaWeights(model, 0.95)
    walk(model, ema, range(5))
    save_file(ema.tensors(), tmp_path / "ema.safetensors")
    kept = weights(model)
    walk(model, ema, range(5, 10))

    found = {}
    for restored in (True, False):
        again = tiny_model()
        again.load_state_dict(kept, strict=False)
        other = EmaWeights(again, 0.95)
        if restored:
            other.restore(load_file(tmp_path / "ema.safetensors"))
        walk(again, other, range(5, 10))
        found[restored] = other.tensors()
    for name, expected in ema.tensors().items():
        assert torch.equal(found[True][name], expected)
        assert not torch.equal(found[False][name], expected) or "running" in name  # these the walk leaves alone


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda saved: saved.pop("2.weight"), "2.weight"),
        (lambda saved: saved.update({"3.weight": torch.ones(1)}), "3.weight"),
        (lambda saved: saved.update({"1.bias": torch.ones(5)}), "1.bias"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_what_does_not_fit_changes_nothing(change, named: str):
    model = tiny_model()
    ema = EmaWeights(model, 0.9)
    saved = {name: tensor + 1 for name, tensor in ema.tensors().items()}
    change(saved)
    before = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    with pytest.raises(CheckpointError, match=named):
        ema.restore(saved)
    assert all(torch.equal(ema.tensors()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_model_has_the_average_inside_and_its_own_weights_after(error: type[BaseException] | None):
    model = tiny_model()
    ema = EmaWeights(model, 0.9)
    walk(model, ema, range(3))
    own, averages = weights(model), {name: tensor.clone() for name, tensor in ema.tensors().items()}
    parameters = list(model.parameters())
    try:
        with ema.in_place():
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, averages.get(name, own[name])), name
                assert torch.equal(parameter, own[name]) == (name not in averages), name
                assert torch.equal(model.state_dict()[name], parameter)
            if error:
                raise error
    except KeyboardInterrupt:
        assert error
    assert all(torch.equal(parameter, own[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(ema.tensors()[name], tensor) for name, tensor in averages.items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # optimisers hold them
