"""Ids after end-of-text have no influence, causal or not, with any pooling."""

import pytest
import torch
from torch import nn

from mmvit.towers.text import TextTransformer

END = 49
SETTINGS = {"mlp_ratio": 4.0, "activation": "gelu", "norm_eps": 1e-5}


KINDS = [(True, "end_of_text"), (False, "end_of_text"), (True, "last"), (False, "last")]


def build(causal: bool = True, pool: str = "end_of_text") -> TextTransformer:
    torch.manual_seed(0)
    embed = nn.Embedding(50, 16)
    return TextTransformer(embed, 12, 2, 2, end_of_text=END, causal=causal, pool=pool, **SETTINGS).eval()


@pytest.fixture(params=KINDS, ids=str)
def tower(request: pytest.FixtureRequest) -> TextTransformer:
    return build(*request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    """Rows that end at positions 3, 5 and 6."""
    ids = torch.randint(0, END, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[torch.arange(3), torch.tensor([3, 5, 6])] = END
    return ids


def test_what_follows_end_of_text_cannot_change_the_embedding(tower: TextTransformer, ids: torch.Tensor):
    changed = ids.clone()
    for row, end in enumerate((3, 5, 6)):
        changed[row, end + 1 :] = (ids[row, end + 1 :] + 7) % END
    assert not torch.equal(changed, ids)
    assert torch.equal(tower(ids).pooled, tower(changed).pooled)


def test_what_precedes_it_does(tower: TextTransformer, ids: torch.Tensor):
    changed = ids.clone()
    changed[:, 1] = (ids[:, 1] + 7) % END
    assert ((tower(ids).pooled - tower(changed).pooled).abs().amax(dim=1) > 1e-4).all()


def test_ids_may_be_cut_to_the_longest_text(tower: TextTransformer, ids: torch.Tensor):
    assert torch.allclose(tower(ids).pooled, tower(ids[:, :7]).pooled, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_pooled_is_the_token_at_end_of_text(causal: bool, ids: torch.Tensor):
    output = build(causal)(ids)
    assert output.tokens.shape == (3, 12, 16)
    assert torch.equal(output.pooled, output.tokens[torch.arange(3), torch.tensor([3, 5, 6])])


@pytest.mark.parametrize("causal", [True, False])
def test_pooled_is_the_last_token_of_the_context_length(causal: bool, ids: torch.Tensor):
    output = build(causal, "last")(ids[:, :7])
    assert output.tokens.shape == (3, 12, 16)
    assert torch.equal(output.pooled, output.tokens[:, -1])


@pytest.mark.parametrize("pool", ["end_of_text", "last"])
def test_only_a_tower_that_is_not_causal_looks_ahead(pool: str, ids: torch.Tensor):
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 7) % END
    for causal in (True, False):
        model = build(causal, pool)
        assert torch.equal(model(ids).tokens[:, :2], model(changed).tokens[:, :2]) == causal


def test_an_unknown_pool_is_named():
    with pytest.raises(ValueError, match=r"pool 'first' is unknown; choose from \['end_of_text', 'last'\]"):
        build(pool="first")


def test_initial_spreads_are_those_of_clip():
    torch.manual_seed(0)
    tower = TextTransformer(
        nn.Embedding(1000, 128), 77, 4, 2, end_of_text=999, causal=True, pool="end_of_text", **SETTINGS
    )
    expected = {
        "token_embedding.weight": 0.02,
        "positions": 0.01,
        "blocks.1.attention.q.weight": 128**-0.5,
        "blocks.2.attention.out.weight": 128**-0.5 / 8**0.5,
        "blocks.3.feed_forward.up.weight": 256**-0.5,
        "blocks.0.feed_forward.down.weight": 128**-0.5 / 8**0.5,
    }
    found = {name: tower.get_parameter(name).std().item() for name in expected}
    assert found == pytest.approx(expected, rel=0.05)
