"""Adapters change nothing at the start, train alone, and merge into weights that compute the same."""

import copy
import importlib.util

import pytest
import torch
from torch import Tensor

from data_tools.core.errors import UsageError
from mmvit.config import LoraConfig
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig, Embeddings
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.start.freeze import freeze
from mmvit.train.start.lora import TARGETS, add_adapters, merge_adapters

pytest.importorskip("peft")
IMAGE = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2)
TEXT = TextConfig(vocab_size=40, context_length=8, end_of_text=39, width=32, depth=2, num_heads=2)


@pytest.fixture
def model() -> DualEncoder:
    torch.manual_seed(0)
    return build_dual_encoder(DualEncoderConfig(embed_dim=16, image=IMAGE, text=TEXT))


def embed(model: DualEncoder) -> Embeddings:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 38, (6, 1, 7), generator=generator)
    ids[..., -1] = 39
    return model(torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8), ids)


def loss(model: DualEncoder) -> Tensor:
    embeddings = embed(model)
    logits = embeddings.logit_scale * embeddings.image @ embeddings.text[:, 0].T
    return torch.nn.functional.cross_entropy(logits, torch.arange(6))


def train(model: DualEncoder, num_steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("targets", [["q", "k", "v"], list(TARGETS)])
def test_each_named_map_has_an_adapter_that_learns(model: DualEncoder, targets: list[str]):
    add_adapters(model, LoraConfig(rank=3, targets=targets))
    train(model, num_steps=1)  # B is no longer zero, so that gradients reach A too
    model.zero_grad()
    loss(model).backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    assert len(adapters) == 2 * len(targets) * (IMAGE.depth + TEXT.depth)
    for name, parameter in adapters.items():
        assert 3 in parameter.shape, name
        assert parameter.grad is not None, name
        # the last block's queries, keys and values of tokens that are not pooled still count in mean and sum
        assert bool(parameter.grad.abs().sum() > 0), name


def test_adapters_change_nothing_at_the_start(model: DualEncoder):
    before = embed(model)
    add_adapters(model, LoraConfig(rank=4, targets=list(TARGETS)))
    after = embed(model)
    assert torch.equal(before.image, after.image)
    assert torch.equal(before.text, after.text)


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_of_the_towers_stay_as_they_are(model: DualEncoder, frozen: bool):
    before = copy.deepcopy(model.state_dict())
    config = LoraConfig(rank=4)
    add_adapters(model, config)
    if not frozen:  # what the test must notice
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    train(model)
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    towers = [name for name in before if "_tower." in name]
    assert all(torch.equal(before[name], after[name]) for name in towers) is frozen
    for name in ("logit_scale", "image_projection.weight", "text_projection.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_what_stands_outside_the_towers_can_be_frozen(model: DualEncoder):
    freeze(model, ["logit_scale"])
    add_adapters(model, LoraConfig(rank=4))
    freeze(model, ["*_projection.*", "image_tower.*"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("text_tower.") and ".lora_" in name for name in trained)


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_merged_weights_compute_the_same(model: DualEncoder, alpha: float):
    plain = copy.deepcopy(model)
    config = LoraConfig(rank=4, alpha=alpha, targets=list(TARGETS))
    add_adapters(model, config)
    train(model)
    merged = merge_adapters(model.state_dict(), config)
    assert list(merged) == list(plain.state_dict())
    with torch.no_grad():
        start = embed(plain)
        plain.load_state_dict(merged)
        for one, two, first in zip(embed(plain)[:2], embed(model)[:2], start[:2], strict=True):
            assert (one - two).abs().max() < 1e-6
            assert (one - first).abs().max() > 1e-2  # the adapters have learnt something


def test_state_without_adapters_stays_as_it_is(model: DualEncoder):
    state = model.state_dict()
    add_adapters(model, LoraConfig())
    merged = merge_adapters(model.state_dict(), LoraConfig())
    assert list(merged) == list(state)
    assert all(merged[name] is tensor or torch.equal(merged[name], tensor) for name, tensor in state.items())


def test_state_with_adapters_is_restored_exactly(model: DualEncoder):
    other = copy.deepcopy(model)
    config = LoraConfig(rank=2, targets=["q", "up"])
    for each in (model, other):
        add_adapters(each, config)
    train(model)
    other.load_state_dict(model.state_dict())
    train(model)
    other_loss, model_loss = loss(other), loss(model)
    assert other_loss != model_loss
    other.load_state_dict(model.state_dict())
    assert torch.equal(loss(other), loss(model))


def test_unknown_layer_and_missing_package_are_reported(model: DualEncoder, monkeypatch: pytest.MonkeyPatch):
    config = LoraConfig(rank=2)
    config.targets = ["query"]
    with pytest.raises(UsageError, match="unknown linear layer 'query'") as error:
        add_adapters(model, config)
    assert error.value.where == "lora.targets"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="need peft") as error:
        add_adapters(model, LoraConfig(rank=2))
    assert "mmvit[lora]" in error.value.hint
