"""One classifier for supervised and zero-shot heads."""

import dataclasses

import pytest
import torch

from mmvit.models.build import build_classifier
from mmvit.models.classifier import ClassifierConfig, HiddenHead, ImageClassifier, zero_shot_head
from mmvit.models.image_towers import tower_config
from mmvit.towers.vit import ViTConfig

IMAGES = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}


def build(**options: object) -> ImageClassifier:
    torch.manual_seed(0)
    return build_classifier(ClassifierConfig(ViTConfig(**SMALL), **options), ["a", "b", "c"]).eval()


def test_logits_are_the_head_on_the_pooled_vector():
    model = build()
    torch.nn.init.normal_(model.head.weight)
    pooled = model.image_tower(model.pixel_norm(IMAGES), None).pooled
    assert torch.equal(model(IMAGES).logits, model.head(pooled))


def test_with_a_projection_the_head_sees_unit_vectors():
    model, seen = build(embed_dim=8), []
    model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(IMAGES)
    assert seen[0].shape == (2, 8)
    assert torch.allclose(seen[0].norm(dim=1), torch.ones(2))


def test_v11_heads_of_pre_training_and_fine_tuning():
    """The hidden head has a tanh layer; a new head gives zero logits, and the hidden layer disappears."""
    model = build(head="hidden")
    assert isinstance(model.head, HiddenHead)
    pooled = model.image_tower(model.pixel_norm(IMAGES), None).pooled
    hidden = (pooled @ model.head.hidden.weight.T + model.head.hidden.bias).tanh()
    assert torch.equal(model(IMAGES).logits, torch.zeros_like(model(IMAGES).logits))
    torch.nn.init.normal_(model.head.out.weight)
    expected = hidden @ model.head.out.weight.T + model.head.out.bias
    assert torch.allclose(model(IMAGES).logits, expected, atol=1e-6)
    assert model(IMAGES).logits.abs().max() > 0
    model.reset_classifier(["x", "y"])
    assert isinstance(model.head, torch.nn.Linear)
    assert torch.equal(model(IMAGES).logits, torch.zeros(2, 2))
    assert model.class_names == ["x", "y"]


def test_d1_two_heads_whose_mean_is_predicted():
    config = dataclasses.replace(tower_config("deit_ti16_distilled"), image_size=32, width=32, depth=2, num_heads=2)
    model = build_classifier(ClassifierConfig(config), ["a", "b", "c"]).eval()
    for head in (model.head, model.distillation_head):
        torch.nn.init.normal_(head.weight)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    output = model(images)
    tokens = model.image_tower(model.pixel_norm(images), None).tokens
    assert torch.equal(output.by_class, model.head(tokens[:, 0]))
    assert torch.equal(output.by_token, model.distillation_head(tokens[:, 1]))
    assert torch.equal(output.logits, (output.by_class + output.by_token) / 2)


def test_a_zero_shot_head_is_frozen_scaled_and_its_own_copy():
    weights = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    head = zero_shot_head(weights, 20.0)
    x = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    assert torch.allclose(head(x), 20.0 * x @ weights.T, atol=1e-5)
    assert not head.weight.requires_grad
    before = head.weight.clone()
    weights.zero_()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("head", ["linear", "hidden"])
def test_a_head_has_a_row_for_each_class(head: str):
    assert build(head=head)(IMAGES).logits.shape == (2, 3)
