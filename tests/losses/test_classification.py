"""Cross-entropy with soft targets and distillation, against the formulas in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.losses.classification import (
    classification_loss,
    hard_distillation_loss,
    soft_distillation_loss,
    soft_targets,
)

B, K = 6, 9
LOSSES = [soft_distillation_loss, hard_distillation_loss]


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the class head, of the distillation head and of the teacher, and soft targets."""
    generator = torch.Generator().manual_seed(0)
    logits, token, teacher = (3 * torch.randn(B, K, generator=generator) for _ in range(3))
    targets = soft_targets(torch.randint(K, (B,), generator=generator), K, 0.1)
    return logits.requires_grad_(), token.requires_grad_(), teacher.requires_grad_(), targets


def softmax(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp(logits.detach().double().numpy() / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits: Tensor, targets: np.ndarray) -> float:
    """The mean over the rows."""
    return float(-(targets * np.log(softmax(logits))).sum() / len(targets))


def divergence(first: Tensor, second: Tensor, temperature: float) -> float:
    """KL(first || second), summed over rows and classes."""
    p, q = softmax(first, temperature), softmax(second, temperature)
    return float((p * np.log(p / q)).sum())


def test_soft_targets():
    found = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(found, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    assert torch.equal(soft_targets(torch.tensor([1]), 3), torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_cross_entropy_is_the_mean_and_parts_add_up(smoothing: float):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(B, K, generator=generator), torch.randint(K, (B,), generator=generator)
    targets = soft_targets(labels, K, smoothing)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing).item()
    assert classification_loss(logits, targets, B).item() == pytest.approx(expected, abs=1e-6)
    parts = [classification_loss(logits[part], targets[part], B) for part in (slice(2), slice(2, B))]
    assert sum(parts).item() == pytest.approx(expected, abs=1e-6)
    # Two processes with three rows each divide by 6 / 2 and are averaged.
    processes = [classification_loss(logits[part], targets[part], B / 2) for part in (slice(3), slice(3, B))]
    assert sum(processes).item() / 2 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("reduction", ["batch", "element"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.1, 3.0), (0.5, 1.0), (1.0, 7.0)])
def test_d2_soft_distillation_is_the_formula(rows, with_token: bool, reduction: str, weight: float, temperature: float):
    """(1 - lambda) CE + lambda tau^2 KL(teacher || student), divided by B, or by B * K as the released code does."""
    logits, token, teacher, targets = rows
    found = soft_distillation_loss(
        logits,
        targets,
        teacher,
        B,
        token_logits=token if with_token else None,
        weight=weight,
        temperature=temperature,
        reduction=reduction,
    )
    taught = token if with_token else logits
    divisor = {"batch": B, "element": B * K}[reduction]
    kl = temperature**2 * divergence(teacher, taught, temperature) / divisor
    expected = (1 - weight) * cross_entropy(logits, targets.double().numpy()) + weight * kl
    assert found.item() == pytest.approx(expected, rel=2e-6)
    other_way = temperature**2 * divergence(taught, teacher, temperature) / divisor
    assert abs(other_way - kl) > 1e-3 * kl  # the direction shows


def test_d2_soft_distillation_as_released(rows):
    """Compute the released DeiT code's loss: F.kl_div with sum, tau^2 over all elements, alpha 0.5 and tau 1."""
    logits, token, teacher, targets = rows
    kl = F.kl_div(F.log_softmax(token, 1), F.log_softmax(teacher, 1), reduction="sum", log_target=True) / token.numel()
    expected = 0.5 * torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean() + 0.5 * kl
    found = soft_distillation_loss(
        logits, targets, teacher, B, token_logits=token, weight=0.5, temperature=1.0, reduction="element"
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_d2_nothing_is_left_to_learn_where_the_student_is_the_teacher(rows):
    logits, _, _, targets = rows
    loss = soft_distillation_loss(logits, targets, logits.detach().clone(), B, weight=1.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() < 1e-6


def test_d2_the_gradient_does_not_depend_on_a_high_temperature(rows):
    """tau^2 undoes the softening: the gradient goes to (z_s - z_t, each less its mean) / K."""
    logits, _, teacher, targets = rows

    def gradient(temperature: float) -> Tensor:
        loss = soft_distillation_loss(logits, targets, teacher, B, weight=1.0, temperature=temperature)
        return torch.autograd.grad(loss, logits)[0]

    centred = [z.detach() - z.detach().mean(dim=1, keepdim=True) for z in (logits, teacher)]
    limit = (centred[0] - centred[1]) / (B * K)
    far, further = gradient(300.0), gradient(600.0)
    assert (far.norm() / further.norm()).item() == pytest.approx(1, abs=0.01)
    assert (further - limit).norm() < 0.02 * limit.norm()
    assert (gradient(1.0) - limit).norm() > 0.2 * limit.norm()


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_d3_hard_distillation_is_two_cross_entropies(rows, with_token: bool, weight: float):
    """The second one on the distillation head where there is one, with the teacher's class not smoothed."""
    logits, token, teacher, targets = rows
    found = hard_distillation_loss(
        logits, targets, teacher, B, token_logits=token if with_token else None, weight=weight
    )
    own = cross_entropy(logits, targets.double().numpy())
    classes = np.eye(K)[teacher.detach().numpy().argmax(axis=1)]
    taught = cross_entropy(token if with_token else logits, classes)
    assert found.item() == pytest.approx((1 - weight) * own + weight * taught, rel=2e-6)


def test_d3_the_halves_are_the_default(rows):
    logits, _, teacher, targets = rows
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits, teacher.argmax(dim=1))) / 2
    assert hard_distillation_loss(logits, targets, teacher, B).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_head_learns_its_own_term_and_the_teacher_nothing(rows, loss):
    logits, token, teacher, targets = rows
    loss(logits, targets, teacher, B, token_logits=token, weight=0.25).backward()
    assert teacher.grad is None
    alone = torch.autograd.grad(0.75 * classification_loss(logits, targets, B), logits)[0]
    assert torch.allclose(logits.grad, alone, atol=1e-7)
    assert token.grad.abs().max() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_distilled_batch_add_up(rows, loss):
    logits, token, teacher, targets = rows
    whole = loss(logits, targets, teacher, B, token_logits=token)
    parts = [
        loss(logits[p], targets[p], teacher[p], B, token_logits=token[p]) for p in (slice(1), slice(1, 4), slice(4, B))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_logits_are_compared_in_float32(rows, loss):
    logits, _, teacher, targets = rows
    found = loss(logits.bfloat16(), targets, teacher.bfloat16(), B)
    assert found.dtype == torch.float32
    assert found.item() == loss(logits.bfloat16().float(), targets, teacher.bfloat16().float(), B).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_of_other_classes_is_refused(rows, loss):
    logits, token, teacher, targets = rows
    with pytest.raises(ValueError, match="the teacher has 8 classes and the student 9"):
        loss(logits, targets, teacher[:, :-1], B, token_logits=token)


def test_an_unknown_reduction_is_refused(rows):
    logits, _, teacher, targets = rows
    with pytest.raises(ValueError, match="'mean' is unknown"):
        soft_distillation_loss(logits, targets, teacher, B, reduction="mean")
