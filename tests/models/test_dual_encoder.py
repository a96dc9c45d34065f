"""The dual encoder: unit rows in float32, one temperature within [1, 100]."""

import math

import pytest
import torch

from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

END = 49
IMAGE = ViTConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2)
TEXT = TextConfig(vocab_size=50, end_of_text=END, context_length=8, width=32, depth=1, num_heads=2)


@pytest.fixture
def model() -> DualEncoder:
    torch.manual_seed(0)
    return build_dual_encoder(DualEncoderConfig(24, image=IMAGE, text=TEXT))


def batch(num_texts: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    ids = torch.randint(0, END, (3, num_texts, 6))
    ids[..., 5] = END
    return images, ids


def test_a_batch_is_encoded_text_by_text(model: DualEncoder):
    images, ids = batch()
    embeddings = model(images, ids)
    assert torch.equal(embeddings.image, model.encode_image(images))
    for view in range(2):
        assert torch.allclose(embeddings.text[:, view], model.encode_text(ids[:, view]), atol=1e-6)
    assert embeddings.logit_scale.item() == pytest.approx(1 / 0.07)


def test_rows_have_unit_length_where_they_are_asked_for(model: DualEncoder):
    images, ids = batch(1)
    for encode, given in ((model.encode_image, images), (model.encode_text, ids[:, 0])):
        plain, unit = encode(given, normalize=False), encode(given)
        assert torch.allclose(unit.norm(dim=1), torch.ones(3))
        assert not torch.allclose(plain.norm(dim=1), torch.ones(3))
        assert torch.allclose(unit, plain / plain.norm(dim=1, keepdim=True), atol=1e-6)


def test_embeddings_are_float32_under_autocast(model: DualEncoder):
    images, ids = batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode_image(images).dtype == model.encode_text(ids[:, 0]).dtype == torch.float32


def test_uint8_pixels_are_normalised_and_floats_pass(model: DualEncoder):
    images, _ = batch()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    normalised = (images / 255 - mean) / std
    assert torch.allclose(model.pixel_norm(images), normalised, atol=1e-5)
    assert model.pixel_norm(normalised) is normalised
    assert torch.allclose(model.encode_image(images), model.encode_image(normalised), atol=1e-5)


@pytest.mark.parametrize(("factor", "kept"), [(1e30, 100.0), (0.5, 1.0), (20.0, 20.0)])
def test_the_factor_stays_within_1_and_100(model: DualEncoder, factor: float, kept: float):
    torch.nn.init.constant_(model.logit_scale, math.log(factor))
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(kept)


def test_a_huge_gradient_cannot_push_it_out(model: DualEncoder):
    optimizer = torch.optim.SGD([model.logit_scale], lr=1.0)
    for direction, bound in ((-1e6, math.log(100)), (1e6, 0.0)):
        model.logit_scale.grad = torch.tensor(direction)
        optimizer.step()
        assert not 0 <= model.logit_scale.item() <= math.log(100)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(bound)


def test_the_initial_factor_is_the_configs():
    model = build_dual_encoder(DualEncoderConfig(24, initial_logit_scale=10.0, image=IMAGE, text=TEXT))
    assert model.logit_scale.item() == pytest.approx(math.log(10))
