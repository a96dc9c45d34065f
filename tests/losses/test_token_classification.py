"""Token classification of captions."""

import math

import pytest
import torch

from mmvit.losses.token_classification import count_captions, token_classification_loss, token_weights

IDS = torch.tensor([[1, 2, 2, 0], [1, 3, 0, 0], [1, 3, 4, 4]])  # 0 is padding


def test_a_token_counts_once_a_caption():
    assert count_captions(IDS, 6).tolist() == [2, 3, 1, 2, 1, 0]


def test_weights_are_inverse_document_frequencies_and_never_negative():
    weights = token_weights(count_captions(IDS, 6), 3, ignored=[0])
    assert weights.tolist() == pytest.approx([0, 0, math.log(3 / 2), 0, math.log(3 / 2), math.log(3)])


def test_loss_is_cross_entropy_with_the_weighted_tokens():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.0, 1.0, 3.0, 1.0, 2.0, 9.0])
    log_p = logits.log_softmax(dim=1)
    rows = [
        (1 * log_p[0, 1] + 3 * log_p[0, 2]) / 4,
        (1 * log_p[1, 1] + 1 * log_p[1, 3]) / 2,
        (1 * log_p[2, 1] + 1 * log_p[2, 3] + 2 * log_p[2, 4]) / 4,
    ]
    found = token_classification_loss(logits, IDS, weights, 3)
    assert found.item() == pytest.approx(-sum(rows).item() / 3, abs=1e-6)
    parts = [token_classification_loss(logits[part], IDS[part], weights, 3) for part in (slice(2), slice(2, 3))]
    assert sum(parts).item() == pytest.approx(found.item(), abs=1e-6)


def test_a_caption_without_weighted_tokens_adds_nothing():
    logits = torch.randn(1, 6, requires_grad=True)
    loss = token_classification_loss(logits, torch.tensor([[0, 1, 0]]), torch.tensor([0.0, 0, 1, 1, 1, 1]), 1)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
