"""Pooling selects or averages the right tokens."""

from functools import partial

import pytest
import torch
from timm.layers import AttentionPoolLatent

from mmvit.layers.pooling import AttentionPool, pool_class, pool_end_of_text, pool_mean

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


def copied(theirs: AttentionPoolLatent, activation: str = "gelu", norm_eps: float = 1e-6) -> AttentionPool:
    ours = AttentionPool(16, 4, mlp_ratio=4.0, activation=activation, norm_eps=norm_eps)
    state = theirs.state_dict()
    renamed = {"probe": state["latent"][0, 0]}
    for kind in ("weight", "bias"):
        k, v = state[f"kv.{kind}"].chunk(2)
        renamed |= {f"attention.k.{kind}": k, f"attention.v.{kind}": v, f"attention.q.{kind}": state[f"q.{kind}"]}
        renamed |= {f"attention.out.{kind}": state[f"proj.{kind}"], f"norm.{kind}": state[f"norm.{kind}"]}
        renamed |= {f"feed_forward.{a}.{kind}": state[f"mlp.{b}.{kind}"] for a, b in (("up", "fc1"), ("down", "fc2"))}
    ours.load_state_dict(renamed)
    return ours


@pytest.mark.parametrize(
    ("wrong", "equal"), [({}, True), ({"activation": "gelu_tanh"}, False), ({"norm_eps": 1e-2}, False)]
)
def test_attention_pooling_is_timms_and_no_other(wrong: dict, equal: bool):
    torch.manual_seed(0)
    theirs = AttentionPoolLatent(16, num_heads=4, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    tokens = torch.randn(3, 5, 16)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        assert ((copied(theirs, **wrong)(tokens) - theirs(tokens)).abs().max() <= 1e-5) == equal


def test_masked_tokens_do_not_count():
    torch.manual_seed(0)
    pool = AttentionPool(4, 2, mlp_ratio=2.0, activation="gelu", norm_eps=1e-6)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 4 + [False]])
    changed = TOKENS.masked_fill(~mask[:, :, None], 9.0)
    for pooled in (pool_mean, pool):
        expected = torch.cat([pooled(TOKENS[i : i + 1, :length]) for i, length in enumerate((5, 2, 4))])
        assert torch.allclose(pooled(changed, mask), expected, atol=1e-6)
        assert not torch.allclose(pooled(changed, mask), pooled(changed), atol=1e-3)
