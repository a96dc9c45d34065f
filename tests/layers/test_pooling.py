"""Which tokens become the vector of a sample."""

import torch

from mmvit.layers.pooling import pool_class, pool_end_of_text, pool_mean

TOKENS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def test_class_is_the_first_token():
    assert torch.equal(pool_class(TOKENS), TOKENS[:, 0])


def test_mean_is_over_all_tokens():
    assert torch.allclose(pool_mean(TOKENS), sum(TOKENS[:, i] for i in range(5)) / 5)


def test_end_of_text_is_the_first_of_its_kind_in_each_row():
    end = 7
    ids = torch.tensor([[9, 1, end, 0, 0], [end, 2, 8, 9, 1], [8, 3, end, 5, end]])  # not the largest id
    expected = torch.stack([TOKENS[0, 2], TOKENS[1, 0], TOKENS[2, 2]])
    assert torch.equal(pool_end_of_text(TOKENS, ids, end), expected)
