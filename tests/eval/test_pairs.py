"""Loss and recall of held-out pairs, against a computation in float64 that goes pair by pair."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmvit.eval import pairs
from mmvit.eval.pairs import pair_scores

SCALE = 14.3


def oracle(image: Any, text: Any, groups: list[int], batch: int) -> tuple[float, list[float]]:
    """Return the loss, and R@1 and R@5 of images, then of captions."""
    image, text = np.asarray(image, float), np.asarray(text, float)
    losses = []
    for start in range(0, len(image) - batch + 1, batch):
        part = range(start, start + batch)
        for one, other in ((image, text), (text, image)):
            for i in part:
                kept = [j for j in part if j == i or groups[j] != groups[i]]
                terms = [math.exp(SCALE * one[i] @ other[j]) for j in kept]
                losses.append(-math.log(math.exp(SCALE * one[i] @ other[i]) / sum(terms)))
    distinct = sorted(set(groups))
    by_caption = {group: text[groups.index(group)] for group in distinct}
    ranks = []
    for i, group in enumerate(groups):
        own = image[i] @ by_caption[group]
        ranks.append(sum(image[i] @ by_caption[each] >= own for each in distinct if each != group))
    back = []
    for group in distinct:
        own = max(by_caption[group] @ image[j] for j in range(len(groups)) if groups[j] == group)
        back.append(sum(by_caption[group] @ image[j] >= own for j in range(len(groups)) if groups[j] != group))
    shares = [sum(rank < k for rank in found) / len(found) for found in (ranks, back) for k in (1, 5)]
    return sum(losses) / len(losses), shares


@pytest.mark.parametrize("num_captions", [40, 17])
def test_scores_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, num_captions: int):
    monkeypatch.setattr(pairs, "LOSS_BATCH", 12)
    torch.manual_seed(0)
    groups = [i % num_captions for i in range(40)]
    captions = F.normalize(torch.randn(num_captions, 8), dim=1)
    text = captions[groups]
    image = F.normalize(text + 0.3 * torch.randn(40, 8), dim=1)
    found = pair_scores(image, text, torch.tensor(groups), SCALE)
    loss, shares = oracle(image, text, groups, 12)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert [*found.image_to_text, *found.text_to_image] == pytest.approx(shares)
    assert 0.2 < found.image_to_text[0] < found.image_to_text[1] < 1


def test_equal_outputs_find_nothing_and_a_solved_set_all():
    rows = F.normalize(torch.ones(20, 4), dim=1)
    collapsed = pair_scores(rows, rows, torch.arange(20), SCALE)
    assert (collapsed.image_to_text, collapsed.text_to_image) == ((0, 0), (0, 0))
    assert collapsed.loss == pytest.approx(math.log(20), rel=1e-5)
    solved = pair_scores(torch.eye(20), torch.eye(20), torch.arange(20), 100.0)
    assert (solved.image_to_text, solved.text_to_image) == ((1, 1), (1, 1))
    assert solved.loss < 1e-6
