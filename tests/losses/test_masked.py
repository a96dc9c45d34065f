"""Masked cross-entropy, and the colour classes of patches."""

import pytest
import torch
import torch.nn.functional as F

from mmvit.layers.patch_embedding import patchify
from mmvit.losses.masked import captioning_loss, masked_patch_loss, mean_colour_classes

PADDING = 0


def test_captioning_is_the_mean_over_tokens_and_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 9, generator=generator)
    targets = torch.randint(0, 9, (6, 5), generator=generator)
    mask = targets != PADDING
    count = int(mask.sum())
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PADDING)
    assert captioning_loss(logits, targets, mask, count).item() == pytest.approx(expected.item(), abs=1e-6)
    parts = [captioning_loss(logits[part], targets[part], mask[part], mask.sum()) for part in (slice(1), slice(1, 6))]
    assert sum(parts).item() == pytest.approx(expected.item(), abs=1e-6)


def test_captions_without_a_token_add_nothing():
    logits = torch.randn(2, 3, 9, requires_grad=True)
    loss = captioning_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool), 5)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_patches_that_were_not_corrupted_have_no_gradient():
    logits = torch.randn(3, 4, 512, requires_grad=True)
    corrupted = torch.tensor([[True, False, False, True], [False] * 4, [False, True, False, False]])
    masked_patch_loss(logits, torch.randint(512, (3, 4)), corrupted, 3).backward()
    assert torch.equal(logits.grad.abs().amax(dim=2) > 0, corrupted)


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((0, 0, 0), 0),
        ((255, 255, 255), 511),
        ((255, 0, 0), 7 * 64),
        ((0, 255, 0), 7 * 8),
        ((0, 0, 255), 7),
        ((31, 32, 64), 0 * 64 + 1 * 8 + 2),  # 3 bits: steps of 32
    ],
)
def test_colour_of_a_patch(colour: tuple[int, int, int], expected: int):
    image = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 8)
    assert mean_colour_classes(patchify(image, 4)).tolist() == [[expected, expected]]


def test_colour_is_that_of_the_mean_and_of_its_own_patch():
    image = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
    image[0, 0, :2, 4:] = 255  # half of the second patch is red: a mean of 127.5
    assert mean_colour_classes(patchify(image, 4)).tolist() == [[0, 3 * 64]]
