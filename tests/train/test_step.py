"""One step: what it does to the weights, and which rows it takes for positives."""

import math

import pytest
import torch
from accelerate import Accelerator

from mmvit.data.batches import Batch
from mmvit.losses.contrastive import contrastive_loss
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.step import StepResult, train_step


@pytest.fixture
def model() -> DualEncoder:
    torch.manual_seed(0)
    image = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2)
    text = TextConfig(vocab_size=20, context_length=6, end_of_text=19, width=16, depth=1, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(embed_dim=8, image=image, text=text))


@pytest.fixture
def batch() -> Batch:
    """Four images with two texts each; in the second view the first two are one caption in two templates."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.randint(3, 19, (4, 2, 5), generator=generator)
    ids[..., -1] = 19
    return Batch(images, ids, torch.tensor([[0, 5], [1, 5], [2, 6], [3, 7]]), ["a", "b", "c", "d"])


def step(model: DualEncoder, batch: Batch, lr: float = 0.0, same_caption_positives: bool = True) -> StepResult:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return train_step(
        Accelerator(),
        model,
        [optimizer],
        batch,
        clip_norm=None,
        same_caption_positives=same_caption_positives,
    )


def test_loss_is_the_mean_over_the_texts_of_an_image(model: DualEncoder, batch: Batch):
    with torch.no_grad():
        image, text, scale = model(batch.images, batch.ids)
        views = [contrastive_loss(image, text[:, view], scale) for view in (0, 1)]
    assert step(model, batch, same_caption_positives=False).loss.item() == pytest.approx(
        sum(views).item() / 2, abs=1e-6
    )


def test_equal_captions_are_positives_only_where_asked(model: DualEncoder, batch: Batch):
    with torch.no_grad():
        image, text, scale = model(batch.images, batch.ids)
        views = [contrastive_loss(image, text[:, view], scale, batch.groups[:, view]) for view in (0, 1)]
    with_positives = step(model, batch, same_caption_positives=True).loss.item()
    assert with_positives == pytest.approx(sum(views).item() / 2, abs=1e-6)
    assert abs(with_positives - step(model, batch, same_caption_positives=False).loss.item()) > 1e-4


def test_logit_scale_is_clamped_after_the_update(model: DualEncoder, batch: Batch):
    with torch.no_grad():
        model.logit_scale.fill_(9.0)  # far beyond the cap, as an exploding update would leave it
    step(model, batch)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
