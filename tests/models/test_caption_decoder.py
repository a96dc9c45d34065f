"""The caption decoder predicts each token only from earlier tokens and the image."""

import pytest
import torch

from mmvit.layers.patch_embedding import Patches, patchify
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

END = 49
IMAGE = ViTConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2)


def build(pool: str = "end_of_text") -> DualEncoder:
    torch.manual_seed(0)
    text = TextConfig(50, end_of_text=END, context_length=8, width=24, depth=1, num_heads=2, pool=pool)
    return build_dual_encoder(DualEncoderConfig(16, caption_depth=2, image=IMAGE, text=text)).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(3, 3, 16, 16)
    ids = torch.randint(0, END, (3, 2, 6))
    ids[..., 5] = END
    return images, ids


@pytest.mark.parametrize("pool", ["end_of_text", "last"])
def test_a_logit_for_each_token_of_the_first_caption_but_its_first(pool: str):
    model, (images, ids) = build(pool), batch()
    logits = model(images, ids).caption_logits
    assert logits.shape == (3, 5, 50)
    assert torch.allclose(model(images, ids[:, :1]).caption_logits, logits, atol=1e-6)
    assert not torch.allclose(model(images, ids[:, 1:]).caption_logits, logits, atol=1e-3)


@pytest.mark.parametrize("place", range(1, 6))
def test_no_token_sees_itself_or_a_later_one(place: int):
    model, (images, ids) = build(), batch()
    changed = ids.clone()
    changed[:, 0, place] = (ids[:, 0, place] + 1) % END
    before, after = model(images, ids).caption_logits, model(images, changed).caption_logits
    assert torch.equal(before[:, :place], after[:, :place])  # those that predict the tokens 1 to `place`
    assert (before[:, place:] != after[:, place:]).any(dim=2).all()


def test_the_image_changes_the_logits():
    model, (images, ids) = build(), batch()
    assert (model(images.flip(0), ids).caption_logits - model(images, ids).caption_logits)[0].abs().max() > 1e-3


def test_dropped_patches_are_not_read():
    model, (images, ids) = build(), batch()
    keep = torch.tensor([[0, 2]] * 3)
    changed = images.clone()
    changed[:, :, :8, 8:] = 0
    assert torch.equal(model(images, ids, keep).caption_logits, model(changed, ids, keep).caption_logits)


def test_padding_of_patches_is_not_read():
    model, (images, ids) = build(), batch()
    pixels = torch.zeros(3, 7, 192)
    pixels[:, :4] = patchify(images, 8)
    logits = model(Patches(pixels, torch.tensor([[2, 2]] * 3)), ids).caption_logits
    assert torch.allclose(logits, model(images, ids).caption_logits, atol=1e-5)


def test_it_learns_to_read_the_image():
    """The one word of a caption identifies one of two images: a decoder that ignores images stays at log(2) / 2."""
    model = build()
    images = torch.stack([torch.full((3, 16, 16), -1.0), torch.full((3, 16, 16), 1.0)])
    ids = torch.tensor([[[40, 7, END]], [[40, 8, END]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        logits = model(images, ids).caption_logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 0, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_every_parameter_gets_a_gradient():
    model, (images, ids) = build(), batch()
    model(images, ids).caption_logits.square().sum().backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert missing == {"image_projection.weight", "text_projection.weight", "logit_scale"}


def test_a_text_tower_that_looks_ahead_is_refused():
    text = TextConfig(50, end_of_text=END, context_length=8, width=24, depth=1, num_heads=2, causal=False)
    with pytest.raises(ValueError, match="a caption decoder needs a causal text tower"):
        build_dual_encoder(DualEncoderConfig(16, caption_depth=2, image=IMAGE, text=text))
