"""Drop path drops whole samples at the given rate and keeps the mean."""

import pytest
import torch
from torch import Tensor, nn

from mmvit.layers.block import Block
from mmvit.layers.drop_path import DrawKey, DropPath, drawing, drop_path_rates
from mmvit.train.run import step_seed


def test_samples_are_dropped_whole_and_the_mean_stays():
    torch.manual_seed(0)
    x = torch.rand(20_000, 2, 3) + 1
    y = DropPath(0.3)(x)
    dropped = (y == 0).flatten(1)
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    assert abs(dropped[:, 0].float().mean().item() - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    assert torch.allclose(y[~dropped[:, 0]], x[~dropped[:, 0]] / 0.7)


def test_nothing_is_dropped_in_evaluation():
    x = torch.randn(8, 2)
    assert DropPath(0.9).eval()(x) is x


def test_the_draw_is_torchs():
    layer, x = DropPath(0.5), torch.ones(64, 1)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)


def test_draws_by_position_are_the_same_for_every_split():
    model, x = nn.Sequential(DropPath(0.3), DropPath(0.6)), torch.ones(4000, 1)
    positions = torch.randperm(10**6, generator=torch.Generator().manual_seed(0))[:4000]

    def kept(rows: slice, seed: int = 5) -> Tensor:
        with drawing(model, DrawKey(positions[rows], seed)):
            return torch.cat([layer(x[rows], branch) > 0 for layer in model for branch in range(3)], dim=1)

    before = torch.get_rng_state()
    whole = kept(slice(None))
    assert torch.equal(whole, torch.cat([kept(slice(start, start + 500)) for start in range(0, 4000, 500)]))
    assert torch.equal(torch.get_rng_state(), before)
    shares = torch.tensor([0.7, 0.7, 0.7, 0.4, 0.4, 0.4])
    assert (whole.float().mean(dim=0) - shares).abs().max() < 0.03
    assert whole.T.float().corrcoef().triu(1).abs().max() < 0.07  # layers and branches draw for themselves
    assert (whole != kept(slice(None), seed=6)).float().mean() > 0.3


def test_draws_end_with_their_block():
    model = nn.Sequential(DropPath(0.5))
    with pytest.raises(KeyError), drawing(model, DrawKey(torch.arange(4), 0)):
        raise KeyError
    assert model[0].draws is None
    assert len(model(torch.ones(7, 1))) == 7


def test_a_dropped_block_is_the_identity_with_no_gradient():
    torch.manual_seed(0)
    block, x = Block(8, 2, drop_path=0.99999), torch.randn(4, 3, 8)
    y = block(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert not any(p.grad.any() for p in block.parameters())
    assert not torch.equal(block.eval()(x), x)


def test_both_branches_draw_for_themselves():
    torch.manual_seed(0)
    block, x = Block(8, 2, drop_path=0.5), torch.randn(400, 3, 8)
    attended = x + 2 * block.attention(block.attention_norm(x))
    cases = [x, attended, *(y + 2 * block.feed_forward(block.feed_forward_norm(y)) for y in (x, attended))]
    y = block(x)
    found = [torch.isclose(y, case, atol=1e-5).flatten(1).all(dim=1).sum().item() for case in cases]
    assert sum(found) == 400
    assert min(found) > 60


def test_rates_rise_evenly():
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_invalid_rates(rate: float):
    with pytest.raises(ValueError, match=r"is not in \[0, 1\)"):
        DropPath(rate)


def test_ranks_and_steps_drop_different_samples():
    """With the same rows on each rank."""
    layer, kept = DropPath(0.5).train(), set()
    for step, rank in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        torch.manual_seed(step_seed(0, step, rank))
        kept.add(tuple(layer(torch.ones(64, 1)).flatten().tolist()))
    assert len(kept) == 5
