"""Attention is the formula, number by number, and a causal row never sees what follows."""

import math

import pytest
import torch
from torch import Tensor, nn

from mmvit.layers.attention import Attention


def by_loops(attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d_h)) V written with loops; `mask` [B, N, N] is True where a query may see a key."""
    q, k, v = (linear(x).tolist() for linear in (attention.q, attention.k, attention.v))
    batch, length, width = x.shape
    head_width = width // attention.num_heads
    mixed = torch.zeros_like(x)
    for b in range(batch):
        for start in range(0, width, head_width):
            columns = range(start, start + head_width)
            for i in range(length):
                seen = [j for j in range(length) if mask[b, i, j]]
                scores = [sum(q[b][i][c] * k[b][j][c] for c in columns) / math.sqrt(head_width) for j in seen]
                weights = [math.exp(score - max(scores)) for score in scores]
                for c in columns:
                    total = sum(weight * v[b][j][c] for weight, j in zip(weights, seen, strict=True))
                    mixed[b, i, c] = total / sum(weights)
    return attention.out(mixed)


@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_equals_the_formula_in_float64(kind: str):
    torch.manual_seed(0)
    attention = Attention(12, 3, causal=kind == "causal").double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    if kind == "causal":
        mask = mask.tril()
    elif kind == "mask":
        mask = (torch.rand(2, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    given = mask[:, None] if kind == "mask" else None
    with torch.no_grad():
        assert (attention(x, given) - by_loops(attention, x, mask)).abs().max() <= 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_multihead_attention_with_its_gradients(causal: bool):
    torch.manual_seed(0)
    ours, theirs = Attention(24, 4, causal=causal), nn.MultiheadAttention(24, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    with torch.no_grad():
        for linear, weight, bias in zip(
            (ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
        ):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, y = (torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected = theirs(y, y, y, attn_mask=hidden, need_weights=False)[0]
    result = ours(x)
    expected.square().sum().backward()
    result.square().sum().backward()
    assert (result - expected).abs().max() <= 1e-6
    assert (x.grad - y.grad).abs().max() <= 1e-5
    packed = torch.cat([ours.q.weight.grad, ours.k.weight.grad, ours.v.weight.grad])
    assert (packed - theirs.in_proj_weight.grad).abs().max() <= 1e-5


def test_a_later_token_cannot_change_an_earlier_output():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    changed = x.clone()
    changed[:, 5] += 1
    causal, full = Attention(16, 2, causal=True), Attention(16, 2)
    with torch.no_grad():
        assert torch.equal(causal(x)[:, :5], causal(changed)[:, :5])
        assert (causal(x)[:, 5:] != causal(changed)[:, 5:]).any(dim=-1).all()
        assert not torch.equal(full(x)[:, :5], full(changed)[:, :5])


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 10 is not divisible by num_heads 3"):
        Attention(10, 3)


def test_a_context_of_another_width_is_attended_to():
    torch.manual_seed(0)
    ours = Attention(24, 4, context_width=10)
    theirs = nn.MultiheadAttention(24, 4, kdim=10, vdim=10, batch_first=True)
    with torch.no_grad():
        for name, linear, bias in zip("qkv", (ours.q, ours.k, ours.v), theirs.in_proj_bias.chunk(3), strict=True):
            getattr(theirs, f"{name}_proj_weight").copy_(linear.weight)
            bias.copy_(linear.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        x, context, hidden = torch.randn(2, 5, 24), torch.randn(2, 7, 10), torch.rand(2, 7) < 0.4
        expected = theirs(x, context, context, key_padding_mask=hidden, need_weights=False)[0]
        assert (ours(x, ~hidden[:, None, None], context) - expected).abs().max() <= 1e-6
        assert (ours(x, None, context) - expected).abs().max() > 1e-3
