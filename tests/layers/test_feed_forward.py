"""The three GELU variants are different functions."""

import math

import pytest
import torch

from mmvit.layers.feed_forward import ACTIVATIONS, FeedForward

FORMULAS = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_v10_each_activation_is_its_formula_and_no_other(name: str):
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    result = ACTIVATIONS[name]()(x)
    for other, formula in FORMULAS.items():
        expected = torch.tensor([formula(value) for value in x.tolist()], dtype=torch.float64)
        assert ((result - expected).abs().max() < 1e-12) == (other == name)


def test_v10_gelu_falls_before_it_rises():
    x = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    assert x[ACTIVATIONS["gelu"]()(x).argmin()].item() == pytest.approx(-0.7518, abs=2e-4)


def test_each_token_is_transformed_by_itself():
    torch.manual_seed(0)
    layer, x = FeedForward(8, 32, "quick_gelu"), torch.randn(3, 5, 8)
    expected = layer.down(FeedForward(1, 1, "quick_gelu").activation(layer.up(x[1, 2])))
    assert torch.allclose(layer(x)[1, 2], expected, atol=1e-6)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"activation 'swish' is unknown; choose from .*'quick_gelu'"):
        FeedForward(8, 32, "swish")
