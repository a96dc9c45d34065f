"""The block equals torch's pre-norm encoder layer, and with a context its decoder layer."""

import pytest
import torch
from torch import nn

from mmvit.layers.block import Block, start_as_identity


def copied_block(theirs: nn.TransformerEncoderLayer, eps: float) -> Block:
    state = theirs.state_dict()
    ours = Block(24, 4, norm_eps=eps)
    for name, part in (("norm1", "attention_norm"), ("norm2", "feed_forward_norm")):
        ours.get_submodule(part).load_state_dict(theirs.get_submodule(name).state_dict())
    ours.feed_forward.up.load_state_dict(theirs.linear1.state_dict())
    ours.feed_forward.down.load_state_dict(theirs.linear2.state_dict())
    ours.attention.out.load_state_dict(theirs.self_attn.out_proj.state_dict())
    for i, linear in enumerate((ours.attention.q, ours.attention.k, ours.attention.v)):
        rows = {kind: state[f"self_attn.in_proj_{kind}"].chunk(3)[i] for kind in ("weight", "bias")}
        linear.load_state_dict(rows)
    return ours


@pytest.mark.parametrize(
    ("norm_first", "eps", "equal"), [(True, 1e-5, True), (False, 1e-5, False), (True, 1e-2, False)]
)
def test_v8_equals_the_pre_norm_encoder_layer_and_no_other(norm_first: bool, eps: float, equal: bool):
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(24, 4, 96, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 7, 24)
    assert ((copied_block(theirs, eps)(x) - theirs(x)).abs().max() <= 1e-5) == equal


def test_a_mask_reaches_the_attention():
    torch.manual_seed(0)
    block, x = Block(16, 2), torch.randn(1, 4, 16)
    changed = x.clone()
    changed[:, 3] += 1
    mask = torch.tensor([[True, True, True, False]])  # [1, N]: for every query
    assert torch.equal(block(x, mask)[:, :3], block(changed, mask)[:, :3])


def test_equals_the_pre_norm_decoder_layer():
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(24, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = Block(24, 4, norm_eps=1e-5, causal=True, context_width=24)
    for name, part in (("norm1", "attention_norm"), ("norm2", "context_norm"), ("norm3", "feed_forward_norm")):
        ours.get_submodule(part).load_state_dict(theirs.get_submodule(name).state_dict())
    for name, part in (("linear1", "feed_forward.up"), ("linear2", "feed_forward.down")):
        ours.get_submodule(part).load_state_dict(theirs.get_submodule(name).state_dict())
    for name, part in (("self_attn", "attention"), ("multihead_attn", "context_attention")):
        state = theirs.get_submodule(name).state_dict()
        for kind in ("weight", "bias"):
            for letter, rows in zip("qkv", state[f"in_proj_{kind}"].chunk(3), strict=True):
                ours.get_parameter(f"{part}.{letter}.{kind}").data.copy_(rows)
            ours.get_parameter(f"{part}.out.{kind}").data.copy_(state[f"out_proj.{kind}"])
    x, context, hidden = torch.randn(2, 6, 24), torch.randn(2, 9, 24), torch.rand(2, 9) < 0.4
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = theirs(x, context, tgt_mask=causal, memory_key_padding_mask=hidden)
    assert (ours(x, context=context, context_mask=~hidden[:, None, None]) - expected).abs().max() <= 1e-5
    assert (ours(x, context=context) - expected).abs().max() > 1e-3


def test_v9_each_token_is_normalised_by_itself():
    torch.manual_seed(0)
    block, x = Block(64, 2, norm_eps=1e-6), 3 * torch.randn(4, 5, 64) + 2
    y = block.attention_norm(x)
    assert y.mean(dim=2).abs().max() <= 1e-5
    assert (y.var(dim=2, correction=0) - 1).abs().max() <= 1e-4
    assert torch.equal(block.attention_norm(x[1:2, 2:3]), y[1:2, 2:3])
    torch.nn.init.normal_(block.attention_norm.weight)
    torch.nn.init.normal_(block.attention_norm.bias)
    mean, variance = x.mean(dim=2, keepdim=True), x.var(dim=2, correction=0, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt() * block.attention_norm.weight + block.attention_norm.bias
    assert (block.attention_norm(x) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("context_width", [None, 8])
def test_options_that_are_off_add_no_parameter(context_width: int | None):
    names = Block(16, 2, context_width=context_width).state_dict().keys()
    more = Block(16, 2, context_width=context_width, qk_norm=True, layer_scale=0.1).state_dict().keys()
    assert names < more
    assert not [name for name in names if "scale" in name or "q_norm" in name]


def test_layer_scale_scales_what_each_branch_adds():
    torch.manual_seed(0)
    block, x = Block(16, 2, layer_scale=0.5), torch.randn(2, 3, 16)
    assert (block.attention_scale.gamma == 0.5).all()
    torch.nn.init.normal_(block.attention_scale.gamma)
    torch.nn.init.zeros_(block.feed_forward_scale.gamma)
    added = block.attention(block.attention_norm(x)) * block.attention_scale.gamma
    assert torch.allclose(block(x), x + added)
    torch.nn.init.ones_(block.feed_forward_scale.gamma)
    assert torch.allclose(block(x), x + added + block.feed_forward(block.feed_forward_norm(x + added)))


def test_layer_scale_holds_for_the_context_too():
    torch.manual_seed(0)
    block, x, context = Block(16, 2, layer_scale=1.0, context_width=8), torch.randn(2, 3, 16), torch.randn(2, 4, 8)
    torch.nn.init.zeros_(block.context_scale.gamma)
    assert torch.equal(block(x, context=context), block(x))


def test_blocks_with_all_options_can_start_as_the_identity():
    torch.manual_seed(0)
    block, x = Block(16, 2, qk_norm=True, layer_scale=0.1, drop_path=0.5), torch.randn(2, 3, 16)
    assert not torch.equal(block.eval()(x), x)
    start_as_identity(block)
    assert torch.equal(block(x), x)
