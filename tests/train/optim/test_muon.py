"""Muon is torch's Muon, matrix by matrix, in either number format."""

import pytest
import torch
from torch import Tensor

from mmvit.train.optim import muon
from mmvit.train.optim.muon import Muon, orthogonalize

SHAPES = [(24, 24), (48, 16), (16, 48), (24, 24), (8, 1)]
KERNEL = (16, 6, 3, 3)


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float) -> Tensor:
    """torch's iteration without its rounding to bfloat16, on one matrix (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrix / matrix.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def train(optimizer: torch.optim.Optimizer, parameters: list[Tensor], num_steps: int = 6) -> list[Tensor]:
    """Take steps along the same random gradients and return what became of the parameters."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.numel(), generator=generator).view_as(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def some_parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def relative_difference(found: list[Tensor], expected: list[Tensor], start: list[Tensor]) -> float:
    """The largest distance, as a share of the way that the parameter went."""
    return max(
        ((a.flatten() - b.flatten()).norm() / (b.flatten() - s.flatten()).norm()).item()
        for a, b, s in zip(found, expected, start, strict=True)
    )


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_steps_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch, bf16: bool, tolerance: float):
    """In bfloat16, two orders of the same sums differ by its 8 bits, 0.4 %, in each of the five iterations."""
    monkeypatch.setattr(muon, "has_bf16_units", lambda device: bf16)
    if not bf16:
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)
    settings = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}
    start, ours, theirs = some_parameters(SHAPES), some_parameters(SHAPES), some_parameters(SHAPES)
    found = train(Muon(ours, **settings), ours)
    expected = train(torch.optim.Muon(theirs, **settings), theirs)
    assert relative_difference(found, expected, start) <= tolerance
    other = some_parameters(SHAPES)
    different = train(torch.optim.Muon(other, **settings | {"nesterov": False}), other)
    assert relative_difference(found, different, start) > 5 * tolerance


def test_a_kernel_is_a_matrix_of_its_output_channels():
    start = some_parameters([KERNEL])
    kernel, matrix = some_parameters([KERNEL]), [some_parameters([KERNEL])[0].detach().flatten(1).requires_grad_()]
    found, expected = train(Muon(kernel), kernel), train(Muon(matrix), matrix)
    assert found[0].shape == KERNEL
    assert torch.equal(found[0].flatten(1), expected[0])
    assert not torch.equal(found[0], start[0])


def test_a_parameter_without_gradient_stays():
    moved, still = some_parameters([(8, 8), (8, 8)])
    before = still.clone()
    moved.grad = torch.randn(8, 8)
    Muon([moved, still]).step()
    assert torch.equal(still, before)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_singular_values_are_pushed_to_about_one(monkeypatch: pytest.MonkeyPatch, bf16: bool, shape: tuple[int, int]):
    monkeypatch.setattr(muon, "has_bf16_units", lambda device: bf16)
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    spread = torch.logspace(-1.5, 0, min(shape))  # the smallest is a thirtieth of the largest
    values = torch.linalg.svdvals(orthogonalize(1000 * u * spread @ vt))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_matrices_of_a_stack_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(muon, "has_bf16_units", lambda device: False)
    matrices = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 4).view(
        4, 1, 1
    )
    for matrix, direction in zip(matrices, orthogonalize(matrices), strict=True):
        assert (direction - newton_schulz(matrix, muon.COEFFICIENTS, 5, 1e-7)).abs().max() <= 1e-5


def test_a_zero_gradient_gives_a_zero_direction():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))
