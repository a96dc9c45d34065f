"""The dual encoder: unit-length float32 embeddings, a temperature within [1, 100]."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmvit.layers.patch_embedding import Patches, patchify
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


@pytest.mark.parametrize(("limit", "kept"), [(None, 1000.0), (50.0, 50.0)])
def test_the_bound_of_the_factor_is_an_option(model: DualEncoder, limit: float | None, kept: float):
    torch.nn.init.constant_(model.logit_scale, math.log(1000))
    model.clamp_logit_scale(limit)
    assert model.logit_scale.exp().item() == pytest.approx(kept, rel=1e-5)


def test_a_plain_clip_has_no_other_parameters(model: DualEncoder):
    names = {name for name in model.state_dict() if "_tower." not in name}
    assert names == {"image_projection.weight", "text_projection.weight", "logit_scale"}
    assert model.logit_scale.shape == ()
    assert model(*batch())[3:] == (None, None, None)


def test_a_logit_bias_is_learned_where_it_has_a_start():
    model = build_dual_encoder(DualEncoderConfig(24, initial_logit_bias=-10.0, image=IMAGE, text=TEXT))
    bias = model(*batch()).logit_bias
    assert (bias.item(), bias.shape, model.logit_bias.shape) == (-10.0, (), ())
    bias.backward()
    assert model.logit_bias.grad == 1


def test_without_an_image_projection_the_towers_output_is_the_embedding():
    model = build_dual_encoder(DualEncoderConfig(32, image_projection=False, image=IMAGE, text=TEXT))
    images, _ = batch()
    pooled = model.image_tower(model.pixel_norm(images)).pooled
    assert torch.equal(model.encode_image(images, normalize=False), pooled)
    assert "image_projection.weight" not in model.state_dict()
    assert model.embed_dim == 32
    with pytest.raises(ValueError, match="embed_dim 24 must be the image tower's width, 32"):
        build_dual_encoder(DualEncoderConfig(24, image_projection=False, image=IMAGE, text=TEXT))


def test_a_text_projection_may_have_a_bias_which_starts_at_zero():
    model = build_dual_encoder(DualEncoderConfig(24, text_projection_bias=True, image=IMAGE, text=TEXT))
    _, ids = batch(1)
    before = model.encode_text(ids[:, 0], normalize=False)
    assert not model.text_projection.bias.any()
    torch.nn.init.ones_(model.text_projection.bias)
    assert torch.allclose(model.encode_text(ids[:, 0], normalize=False), before + 1, atol=1e-6)


def test_patches_are_normalised_as_their_images_are(model: DualEncoder):
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    patches = Patches(patchify(images, 8), torch.tensor([[2, 3], [2, 3]]))
    normalised = model.pixel_norm(patches)
    assert torch.equal(normalised.pixels, patchify(model.pixel_norm(images), 8))
    assert model.pixel_norm(normalised).pixels is normalised.pixels
    assert (model.encode_image(patches) - model.encode_image(images)).abs().max() <= 1e-5


def test_the_number_of_patches(model: DualEncoder):
    patches = Patches(torch.zeros(1, 7, 192, dtype=torch.uint8), torch.tensor([[2, 3]]))
    found = [model.num_patches(images) for images in (torch.zeros(2, 3, 16, 40), patches, torch.zeros(2, 24))]
    assert found == [10, 7, 0]


def test_dropped_patches_do_not_count(model: DualEncoder):
    images, ids = batch()
    keep = torch.tensor([[0, 2], [1, 3], [2, 3]])
    dropped = model(images, ids, keep)
    assert torch.allclose(dropped.image[:1], model(images[:1], ids[:1], keep[:1]).image, atol=1e-6)
    changed = images.clone()
    changed[0, :, :8, 8:] = 0  # patch 1 of the first image, which it does not keep
    assert torch.equal(model(changed, ids, keep).image, dropped.image)
    assert not torch.equal(model(changed, ids).image, model(images, ids).image)


def test_stored_embeddings_stand_in_for_the_tower(model: DualEncoder):
    _, ids = batch()
    stored = 3 * torch.randn(3, 24)
    embeddings = model(stored, ids)
    assert torch.equal(embeddings.image, F.normalize(stored, dim=-1))
    assert torch.equal(embeddings.text, model(batch()[0], ids).text)
    embeddings.text.sum().backward()
    assert all(parameter.grad is None for parameter in model.image_tower.parameters())


@pytest.mark.parametrize("extra", [{"caption_depth": 1}, {"token_head": True}, {}], ids=str)
def test_stored_embeddings_are_refused_where_tokens_are_needed(extra: dict):
    model = build_dual_encoder(DualEncoderConfig(24, image=IMAGE, text=TEXT, **extra))
    keep = None if extra else torch.tensor([[0], [1], [2]])
    with pytest.raises(ValueError, match="stored image embeddings support no patch dropout, caption decoder or token"):
        model(torch.randn(3, 24), batch()[1], keep)


def test_the_token_head_scores_the_vocabulary_from_the_pooled_image():
    model = build_dual_encoder(DualEncoderConfig(24, token_head=True, image=IMAGE, text=TEXT))
    images, ids = batch()
    logits = model(images, ids).token_logits
    assert logits.shape == (3, 50)
    assert torch.equal(logits, model.token_head(model.image_tower(model.pixel_norm(images)).pooled))
