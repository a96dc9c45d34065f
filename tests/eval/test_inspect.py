"""What a tower has learned and where it looks: closed forms, other ways to compute it, and known answers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.core.errors import UsageError
from mmvit.eval.encoder import Encoder
from mmvit.eval.inspect import (
    attend,
    attention_distance,
    attention_distances,
    first_filters,
    has_patch_filters,
    image_size_maps,
    patch_filters,
    position_similarity,
    relevance_maps,
    rollout,
    rollout_maps,
    views,
)
from mmvit.models.dual_encoder import DualEncoder
from mmvit.models.image_towers import build_image_tower
from mmvit.towers.contract import Tower
from mmvit.towers.cvt import CvTConfig
from mmvit.towers.resnet import ResNetConfig
from mmvit.towers.swin import SwinConfig
from mmvit.towers.vit import VisionTransformer, ViTConfig

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (240, 240, 0)}


def vit(**values: object) -> VisionTransformer:
    """A small tower in which no weight is at its start value."""
    torch.manual_seed(0)
    sizes: dict[str, object] = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "num_heads": 4}
    config = ViTConfig(**(sizes | values))  # type: ignore[arg-type]
    tower = build_image_tower(config)
    assert isinstance(tower, VisionTransformer)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def pictures(num: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(num, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_v15_principal_components_of_the_patch_filters():
    tower = vit(width=256)
    filters = patch_filters(tower)
    assert filters.images.shape == (28, 8, 8, 3)
    flat = filters.images.flatten(1)
    assert (flat @ flat.T - torch.eye(28)).abs().max() <= 1e-5
    assert filters.explained.tolist() == sorted(filters.explained.tolist(), reverse=True)
    assert 28 / 192 < filters.explained.sum() < 1

    weight = tower.embed.projection.weight.detach().permute(0, 2, 3, 1)  # type: ignore[union-attr]
    full = patch_filters(tower, num=10_000)
    assert len(full.images) == 8 * 8 * 3
    assert full.explained.sum() == pytest.approx(1)
    rebuilt = full.mean + torch.einsum("dn,npqc->dpqc", full.scores, full.images)
    assert (rebuilt - weight).abs().max() <= 1e-5
    part = filters.mean + torch.einsum("dn,npqc->dpqc", filters.scores, filters.images)
    assert (part - weight).abs().max() > 0.1
    centred = weight.flatten(1) - weight.flatten(1).mean(dim=0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    assert torch.allclose(filters.explained, eigenvalues[:28] / eigenvalues.sum(), atol=1e-5)


def test_planted_filters_are_found():
    tower = vit(width=64)
    planted = torch.linalg.qr(torch.randn(192, 2)).Q.T.unflatten(1, (3, 8, 8))
    with torch.no_grad():
        weights = torch.randn(64, 2) * torch.tensor([3.0, 1.0])
        tower.embed.projection.weight.copy_(torch.einsum("dn,ncpq->dcpq", weights, planted))  # type: ignore[union-attr]
    filters = patch_filters(tower, 3)
    assert filters.explained[:2].sum() == pytest.approx(1)
    span = planted.permute(0, 2, 3, 1).flatten(1)
    assert torch.linalg.svdvals(span @ filters.images[:2].flatten(1).T) == pytest.approx([1, 1], abs=1e-4)


def test_a_stem_has_first_filters_instead():
    tower = vit(stem_channels=[8, 16, 16])
    assert not has_patch_filters(tower)
    assert first_filters(tower).shape == (8, 3, 3, 3)
    with pytest.raises(UsageError, match="no patch embedding"):
        patch_filters(tower)


def test_v16_cosines_of_the_position_table():
    similarity = position_similarity(vit())
    assert similarity.shape == (4, 4, 4, 4)  # the class token is not among them
    matrix = similarity.flatten(2).flatten(0, 1)
    assert (matrix.diagonal() - 1).abs().max() <= 1e-6
    assert (matrix - matrix.T).abs().max() <= 1e-6
    assert matrix.abs().max() <= 1 + 1e-6

    tower = vit()
    assert tower.positions is not None
    rows = tower.positions.detach()[1:]
    assert similarity[1, 2, 3, 0] == pytest.approx(F.cosine_similarity(rows[6], rows[12], dim=0).item(), abs=1e-6)


def test_v16_rows_and_columns_show_in_a_two_dimensional_table():
    similarity = position_similarity(vit(position="sincos_2d"))
    for row, column in np.ndindex(4, 4):
        own = similarity[row, column]
        # The cosine of two places is the mean of what their rows and what their columns share, so each map is a cross:
        # the sum of a profile over rows and one over columns, greatest at its own row and at its own column.
        assert (own - own[row] - own[:, column : column + 1] + own[row, column]).abs().max() <= 1e-6
        assert (own.argmax(dim=0) == row).all()
        assert (own.argmax(dim=1) == column).all()
    learned = position_similarity(vit())[1, 1]
    assert (learned - learned[1] - learned[:, 1:2] + learned[1, 1]).abs().max() > 0.05  # a random table has no cross


@pytest.mark.parametrize("position", ["relative", "rotary", "none"])
def test_a_tower_without_a_table_says_so(position: str):
    tower = vit(position=position)
    with pytest.raises(UsageError, match=position):
        position_similarity(tower)
    assert "positions" not in views(tower, with_text=False)
    assert attention_distances(tower, pictures(2)).shape == (3, 4)


def test_v17_attention_distance_in_closed_form():
    grid, patch_size = (3, 5), 16
    places = [(row, column) for row in range(3) for column in range(5)]
    mean = sum(math.dist(a, b) for a in places for b in places) / 15**2
    identity = torch.eye(15).expand(2, 4, -1, -1)
    even = torch.full((2, 4, 15, 15), 1 / 15)
    assert attention_distance(identity, grid, patch_size).tolist() == [0.0] * 4
    assert attention_distance(even, grid, patch_size).tolist() == pytest.approx([16 * mean] * 4)
    assert attention_distance(even[:, :1, :4, :4] * 15 / 4, (2, 2), 1).item() == pytest.approx((2 + math.sqrt(2)) / 4)

    mixed = torch.cat([identity[:, :1], even[:, :1], (identity[:, :1] + even[:, :1]) / 2], dim=1)
    assert attention_distance(mixed, grid, patch_size).tolist() == pytest.approx([0, 16 * mean, 8 * mean])

    right = torch.eye(15).roll(1, dims=1).expand(1, 1, -1, -1)  # each patch looks at the next: the row's last far away
    assert attention_distance(right, grid, 1).item() == pytest.approx((12 + 2 * math.sqrt(17) + math.sqrt(20)) / 15)


def test_v17_the_class_token_and_registers_are_left_out():
    among = torch.rand(1, 2, 6, 6).softmax(dim=3)
    rows = torch.cat([torch.full((1, 2, 6, 2), 0.25), 0.5 * among], dim=3)  # half of the attention is theirs
    weights = torch.cat([torch.full((1, 2, 2, 8), 1 / 8), rows], dim=2)
    assert weights.sum(dim=3) == pytest.approx(1)
    expected = attention_distance(among, (2, 3), 8)
    assert attention_distance(weights, (2, 3), 8) == pytest.approx(expected, rel=1e-5)
    assert attention_distance(rows[..., 2:], (2, 3), 8) == pytest.approx(expected, rel=1e-5)


def test_v17_the_mean_over_images_is_that_of_single_ones():
    tower, images = vit(num_registers=2), pictures(11)
    single = torch.stack([attention_distances(tower, image[None]) for image in images])
    assert attention_distances(tower, images) == pytest.approx(single.mean(dim=0), rel=1e-5)


def test_v18_rollout():
    weights = [torch.randn(2, 3, 5, 5).softmax(dim=3) for _ in range(4)]
    shares = rollout(weights)
    assert shares.sum(dim=2) == pytest.approx(1, abs=1e-6)
    assert rollout([torch.eye(5).expand(2, 3, -1, -1)] * 4).tolist() == torch.eye(5).expand(2, -1, -1).tolist()
    expected = torch.eye(5)
    for layer in weights:
        expected = 0.5 * (layer[1].mean(dim=0) + torch.eye(5)) @ expected
    assert (shares[1] - expected).abs().max() <= 1e-6
    assert (rollout(weights[::-1])[1] - expected).abs().max() > 1e-3  # the order of the layers counts

    # One layer in which the first token looks at the fourth alone: half stays, half comes from there.
    looking = torch.eye(5)
    looking[0] = F.one_hot(torch.tensor(3), 5)
    assert rollout([looking.expand(1, 2, -1, -1)])[0, 0].tolist() == [0.5, 0, 0, 0.5, 0]


READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "class": lambda shares: shares[:, 2, 3:],  # after two registers; class and distillation token before the patches
    "mean": lambda shares: shares[:, 2:, 2:].mean(dim=1),
}


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_v18_rollout_map_of_a_tower(pool: str):
    tower = vit(pool=pool, num_registers=2)
    images = pictures(9, 24, 40)
    attended = attend(tower, images)
    assert [layer.shape for layer in attended.weights] == [(9, 4, 17 + (pool == "class"), 17 + (pool == "class"))] * 3
    maps = rollout_maps(tower, images)
    assert maps.shape == (9, 3, 5)
    assert (maps.flatten(1) - READOUTS[pool](rollout(attended.weights))).abs().max() <= 1e-6
    stretched = image_size_maps(maps, (24, 40))
    assert stretched.shape == (9, 24, 40)
    assert (stretched[:, 4::8, 4::8].mean() - maps.mean()).abs() < 0.1 * maps.mean()


def test_v18_the_attention_pool_weighs_the_rows():
    tower, images = vit(pool="attention", num_registers=1), pictures(2)
    attended = attend(tower, images)
    assert attended.readout[:, 0].tolist() == [0, 0]
    assert attended.readout.sum(dim=1) == pytest.approx(1)
    assert rollout_maps(tower, images).flatten(1).sum(dim=1).max() < 1  # the register has its share
    with torch.no_grad():
        tower.pool.attention.q.weight.zero_()  # type: ignore[attr-defined]
        tower.pool.attention.q.bias.zero_()  # type: ignore[attr-defined]
    assert attend(tower, images).readout[:, 1:] == pytest.approx(1 / 16)


@pytest.mark.parametrize("options", [{}, {"position": "relative"}, {"position": "rotary"}, {"qk_norm": True}])
def test_the_weights_are_those_that_the_blocks_use(options: dict[str, object]):
    tower, images = vit(depth=1, **options), pictures(2)
    block = tower.blocks[0]
    inputs: list[Tensor] = []
    handles = [
        block.attention.register_forward_pre_hook(lambda module, given: inputs.append(given[0])),  # type: ignore[union-attr]
        block.attention.out.register_forward_pre_hook(lambda module, given: inputs.append(given[0])),  # type: ignore[union-attr]
    ]
    weights = attend(tower, images).weights[0]
    for handle in handles:
        handle.remove()
    values = block.attention.v(inputs[0]).unflatten(2, (4, -1)).transpose(1, 2)  # type: ignore[operator,union-attr]
    assert (weights @ values - inputs[1].unflatten(2, (4, -1)).transpose(1, 2)).abs().max() <= 1e-5
    assert not block.attention._forward_pre_hooks  # nothing is left behind


def pasted(left: str, right: str, seed: int) -> Tensor:
    """An image of two colours, 16x32 px."""
    rng = np.random.default_rng(seed)
    halves = [np.array(COLOURS[name]) + rng.integers(-15, 16, (16, 16, 3)) for name in (left, right)]
    return torch.from_numpy(np.concatenate(halves, axis=1).clip(0, 255).astype(np.uint8)).permute(2, 0, 1)[None]


def test_relevance_lies_on_the_half_that_the_text_names(encoder: Encoder):
    own, total = 0, 0
    for left in COLOURS:
        for right in set(COLOURS) - {left}:
            image = pasted(left, right, total)
            for text, columns in ((left, slice(0, 2)), (right, slice(2, 4))):
                maps = relevance_maps(encoder.model, image, encoder.encode_text([text])[0])
                assert maps.shape == (1, 2, 4)
                assert (maps >= 0).all()
                own += bool(maps[0, :, columns].sum() > maps.sum() / 2)
                total += 1
    assert total == 24
    assert own >= 0.8 * total  # chance is a half


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_relevance_is_that_of_gradients_through_the_weights(
    encoder: Encoder, pool: str, monkeypatch: pytest.MonkeyPatch
):
    tower, text = vit(pool=pool, num_registers=2), torch.randn(32)
    model = contrastive(tower, encoder)
    images = torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8)
    found = relevance_maps(model, images, text)

    seen: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        seen.append((q @ k.mT / q.shape[3] ** 0.5).softmax(dim=3))
        seen[-1].retain_grad()
        return seen[-1] @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    output = tower(model.pixel_norm(images))
    output.tokens.retain_grad()
    (output.pooled @ text).sum().backward()
    shares = torch.eye(seen[0].shape[3]).expand(2, -1, -1)
    for weights in seen[:3]:  # the fourth is the attention pool's
        assert weights.grad is not None
        shares = shares + (weights * weights.grad).clamp_min(0).mean(dim=1) @ shares
    if pool == "class":
        expected = shares[:, 2, 3:]
    else:
        assert output.tokens.grad is not None
        start = (output.tokens * output.tokens.grad).sum(dim=2).detach()
        if pool == "mean":
            assert start.sum(dim=1) == pytest.approx((output.pooled @ text).detach(), rel=1e-3)  # the exact split
        expected = (start.clamp_min(0)[:, None] @ shares[:, 2:, 2:])[:, 0]
    assert (found.flatten(1) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_relevance_takes_frozen_models_and_leaves_no_gradient(encoder: Encoder):
    image, text = pasted("red", "blue", 0), encoder.encode_text(["red"])[0]
    before = relevance_maps(encoder.model, image, text)
    required = [parameter.requires_grad for parameter in encoder.model.parameters()]
    encoder.model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(relevance_maps(encoder.model, image, text), before)
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    for parameter, value in zip(encoder.model.parameters(), required, strict=True):
        parameter.requires_grad_(value)


def contrastive(tower: Tower, encoder: Encoder) -> DualEncoder:
    """The tower beside the text tower of a trained model."""
    model = encoder.model
    return DualEncoder(tower, model.text_tower, tower.width, model.pixel_norm, image_projection=False).eval()


def other_towers() -> dict[str, Tower]:
    torch.manual_seed(0)
    swin = SwinConfig(width=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    cvt = CvTConfig(widths=[16, 16, 32], depths=[1, 1, 1], num_heads=[1, 1, 1])
    resnet = ResNetConfig(image_size=64, width=32, depths=[1, 1, 1, 1], stem_width=16, num_heads=4)
    return {config.kind: build_image_tower(config).eval() for config in (swin, cvt, resnet)}


def test_views_of_towers_without_global_attention(encoder: Encoder):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = {"swin": ["filters", "relevance"], "cvt": ["filters"], "resnet": ["filters", "relevance"]}
    for kind, tower in other_towers().items():
        assert views(tower, with_text=True) == expected[kind]
        assert views(tower, with_text=False) == ["filters"]
        assert has_patch_filters(tower) == (kind == "swin")
        with pytest.raises(UsageError, match=f"a {type(tower).__name__} has no attention"):
            attention_distances(tower, images.float())
        model = contrastive(tower, encoder)
        if kind == "cvt":
            with pytest.raises(UsageError, match="no tokens comparable"):
                relevance_maps(model, images, torch.randn(32))
        else:
            side = 64 // tower.stride
            assert relevance_maps(model, images, torch.randn(tower.width)).shape == (2, side, side)
    assert views(vit(), with_text=True) == ["filters", "positions", "distance", "rollout", "relevance"]
    assert patch_filters(other_towers()["swin"]).images.shape[1:] == (4, 4, 3)
