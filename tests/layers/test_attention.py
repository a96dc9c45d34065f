"""Attention matches its formula; masked, future and padding positions have no influence."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvit.layers.attention import Attention


def by_loops(attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d_h)) V with loops; `mask` [B, N, N] is True where a query attends to a key."""
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


@pytest.mark.parametrize("kind", ["all", "causal", "mask", "causal mask"])
def test_t1_equals_loops_and_torch_in_float64(kind: str):
    torch.manual_seed(0)
    attention = Attention(12, 3, causal="causal" in kind).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    if "mask" in kind:
        mask = (torch.rand(2, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    given = mask[:, None] if "mask" in kind else None
    if "causal" in kind:
        mask = mask.tril()
    q, k, v = (linear(x).unflatten(2, (3, 4)).transpose(1, 2) for linear in (attention.q, attention.k, attention.v))
    with torch.no_grad():
        result, weights = attention(x, given), attention.weights(x, given)
        by_torch = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        assert (result - by_loops(attention, x, mask)).abs().max() <= 1e-12
        assert (result - attention.out(by_torch.transpose(1, 2).flatten(2))).abs().max() <= 1e-12
        assert (weights.sum(dim=3) - 1).abs().max() <= 1e-12
        assert (weights @ v - by_torch).abs().max() <= 1e-12
        assert torch.equal(weights > 0, mask[:, None].expand_as(weights))


def test_t1_keys_with_their_values_in_any_order():
    torch.manual_seed(0)
    attention, x, context = Attention(12, 3).double(), *torch.randn(2, 2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = attention(x, None, context)
        assert (attention(x, None, context[:, torch.randperm(5)]) - expected).abs().max() <= 1e-12
        nn.init.zeros_(attention.q.weight)
        nn.init.zeros_(attention.q.bias)
        mean = attention.out(attention.v(context).mean(dim=1, keepdim=True))
        assert (attention(x, None, context) - mean).abs().max() <= 1e-12
        assert (expected - mean).abs().max() > 1e-2


@pytest.mark.parametrize("width", [16, 64, 256, 1024])
def test_t2_the_root_keeps_the_variance_of_scores_at_one(width: int):
    """Queries and keys are drawn from N(0, 1); a softmax determines the scores up to the mean of each row."""
    torch.manual_seed(0)
    attention = Attention(width, 1)
    for linear in (attention.q, attention.k):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    x, context = torch.randn(1, 200, width), torch.randn(1, 400, width)
    with torch.no_grad():
        weights = attention.weights(x, None, context)
    variance = weights.log().var(dim=3).mean().item()
    assert 0.9 <= variance <= 1.1
    products = (x[0] @ context[0].T).var(dim=1).mean().item()
    assert 0.9 * width <= products <= 1.1 * width


@pytest.mark.parametrize("causal", [False, True])
def test_t7_equals_torch_multihead_attention_with_its_gradients(causal: bool):
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


def test_t7_one_head_count_and_order_of_heads():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    attention = Attention(12, 1)
    plain = F.scaled_dot_product_attention(attention.q(x), attention.k(x), attention.v(x))
    assert (attention(x) - attention.out(plain)).abs().max() <= 1e-6
    assert sum(p.numel() for p in attention.parameters()) == 4 * 12**2 + 4 * 12
    attention = Attention(12, 3)
    permuted = copy.deepcopy(attention)
    columns = torch.arange(12).unflatten(0, (3, 4))[[2, 0, 1]].flatten()
    with torch.no_grad():
        for linear in (permuted.q, permuted.k, permuted.v):
            linear.weight.copy_(linear.weight[columns])
            linear.bias.copy_(linear.bias[columns])
        assert (permuted(x) - attention(x)).abs().max() > 1e-3
        permuted.out.weight.copy_(permuted.out.weight[:, columns])
    assert (permuted(x) - attention(x)).abs().max() <= 1e-6


def test_t3_a_later_token_cannot_change_an_earlier_output():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    changed = x.clone()
    changed[:, 5] += 1
    causal, full = Attention(16, 2, causal=True), Attention(16, 2)
    with torch.no_grad():
        assert torch.equal(causal(x)[:, :5], causal(changed)[:, :5])
        assert (causal(x)[:, 5:] != causal(changed)[:, 5:]).any(dim=-1).all()
        assert not torch.equal(full(x)[:, :5], full(changed)[:, :5])
        lower = torch.ones(9, 9, dtype=torch.bool).tril()
        full.load_state_dict(causal.state_dict())
        assert (full(x, lower) - causal(x)).abs().max() <= 1e-6
        assert (causal(x)[:, 0] - causal.out(causal.v(x[:, 0]))).abs().max() <= 1e-6
        assert causal.weights(x)[:, :, 0].flatten(0, 1).tolist() == [[1.0] + [0.0] * 8] * 4


def test_t3_the_jacobian_is_triangular():
    torch.manual_seed(0)
    attention = Attention(8, 2, causal=True)
    jacobian = (
        torch.autograd.functional.jacobian(lambda x: attention(x[None])[0], torch.randn(6, 8)).abs().amax(dim=(1, 3))
    )
    assert not jacobian.triu(1).any()
    assert (jacobian.tril() > 0).sum() == 6 * 7 / 2


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_t3_a_query_without_keys_gets_zeros_and_no_nan(kind: torch.dtype):
    torch.manual_seed(0)
    attention, x = Attention(16, 2), torch.randn(2, 3, 16, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    if kind == torch.float32:
        mask = torch.zeros(3, 3).masked_fill(~mask, -math.inf)
    y = attention(x, mask)
    y.square().sum().backward()
    assert torch.equal(y[:, 1], attention.out.bias.expand(2, -1))
    assert torch.equal(attention.weights(x, mask)[:, :, 1], torch.zeros(2, 2, 3))
    assert not any(p.grad.isnan().any() for p in [x, *attention.parameters()])


def test_t4_padding_and_its_length_change_nothing():
    torch.manual_seed(0)
    attention, x = Attention(16, 2), torch.randn(2, 4, 16)
    expected = attention(x)
    for length, value in ((5, 0.0), (5, 7.0), (11, -3.0)):
        padded = F.pad(x, (0, 0, 0, length - 4), value=value)
        mask = torch.arange(length)[None] < 4
        assert (attention(padded, mask)[:, :4] - expected).abs().max() <= 1e-6
        assert (attention(padded)[:, :4] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(5, 7), (3, 1, 7), (2, 3, 5, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_is_added_to_the_scores(shape: tuple[int, ...], causal: bool):
    torch.manual_seed(0)
    attention, x, context = Attention(12, 3, causal=causal), torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    bias = torch.randn(shape, requires_grad=True)
    q, k, v = (
        linear(y).unflatten(2, (3, 4)).transpose(1, 2)
        for linear, y in ((attention.q, x), (attention.k, context), (attention.v, context))
    )
    scores = q @ k.mT / 2 + bias
    if causal:
        scores = scores.masked_fill(torch.ones(5, 7, dtype=torch.bool).triu(1), -math.inf)
    expected = attention.out((scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2))
    assert (attention(x, bias, context) - expected).abs().max() <= 1e-6
    assert (attention.weights(x, bias, context) - scores.softmax(dim=3)).abs().max() <= 1e-6
    attention(x, bias, context).square().sum().backward()
    assert bias.grad.abs().max() > 0


def test_queries_and_keys_are_normalised_where_asked():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    assert not [name for name in Attention(12, 3).state_dict() if "norm" in name]
    attention = Attention(12, 3, qk_norm=True, norm_eps=1e-3)
    for norm in (attention.q_norm, attention.k_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    q, k = (
        F.layer_norm(linear(x).unflatten(2, (3, 4)).transpose(1, 2), [4], norm.weight, norm.bias, 1e-3)
        for linear, norm in ((attention.q, attention.q_norm), (attention.k, attention.k_norm))
    )
    assert (attention.weights(x) - (q @ k.mT / 2).softmax(dim=3)).abs().max() <= 1e-6
    mixed = attention.weights(x) @ attention.v(x).unflatten(2, (3, 4)).transpose(1, 2)
    assert (attention(x) - attention.out(mixed.transpose(1, 2).flatten(2))).abs().max() <= 1e-6


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
