"""One classifier for supervised and zero-shot heads."""

import pytest
import torch
from torch import nn

from mmvit.models.classifier import ImageClassifier, zero_shot_head


def test_logits_are_the_head_on_the_features():
    head, x = nn.Linear(4, 3), torch.randn(2, 4)
    assert torch.equal(ImageClassifier(nn.Identity(), head, ["a", "b", "c"])(x), head(x))


def test_a_zero_shot_head_is_frozen_scaled_and_its_own_copy():
    weights = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    head = zero_shot_head(weights, 20.0)
    x = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    assert torch.allclose(head(x), 20.0 * x @ weights.T, atol=1e-5)
    assert not head.weight.requires_grad
    before = head.weight.clone()
    weights.zero_()
    assert torch.equal(head.weight, before)


def test_a_head_that_does_not_fit_the_names_is_refused():
    with pytest.raises(ValueError, match="the head has 3 rows for 2 class names"):
        ImageClassifier(nn.Identity(), nn.Linear(4, 3), ["a", "b"])
