"""Distillation, in addition to the contract table: its direction, its zero, and a teacher without gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.losses.distillation import distillation_loss


def unit_rows(seed: int, width: int) -> Tensor:
    return F.normalize(torch.randn(10, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    image, text, scale = unit_rows(0, 6).requires_grad_(), unit_rows(1, 6), torch.tensor(20.0)
    loss = distillation_loss(image, text, scale, image, text, scale)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert image.grad.abs().max() <= 1e-6


def test_it_is_the_divergence_of_the_student_from_the_teacher_not_the_reverse():
    student, teacher = (unit_rows(0, 6), unit_rows(1, 6)), (unit_rows(2, 4), unit_rows(3, 4))
    logits, expected = 8 * student[0] @ student[1].T, 20 * teacher[0] @ teacher[1].T

    def divergence(of: Tensor, from_: Tensor) -> float:
        pairs = [(of, from_), (of.T, from_.T)]
        terms = [F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="batchmean", log_target=True) for a, b in pairs]
        return (sum(terms) / 2).item()

    found = distillation_loss(*student, torch.tensor(8.0), *teacher, torch.tensor(20.0)).item()
    assert found == pytest.approx(divergence(expected, logits), abs=1e-5)
    assert abs(found - divergence(logits, expected)) > 0.1


def test_the_teacher_gets_no_gradient():
    teacher = [unit_rows(2, 4).requires_grad_(), unit_rows(3, 4).requires_grad_(), torch.tensor(20.0).requires_grad_()]
    image = unit_rows(0, 6).requires_grad_()
    distillation_loss(image, unit_rows(1, 6), torch.tensor(8.0), *teacher).backward()
    assert image.grad is not None
    assert [tensor.grad for tensor in teacher] == [None, None, None]
