"""Masked patch prediction as in the ViT paper: the corruption depends only on (seed, position)."""

import math

import pytest
import torch
from sklearn.datasets import load_digits

from mmvit.layers.patch_corruption import Corruption, corrupt, corrupted_patches
from mmvit.layers.patch_dropout import kept_patches
from mmvit.layers.patch_embedding import patchify
from mmvit.losses.masked import masked_patch_loss, mean_colour_classes
from mmvit.models.image_towers import build_image_tower
from mmvit.models.masked_patches import MaskedPatchModel
from mmvit.models.pixels import PixelNorm
from mmvit.towers.vit import ViTConfig


def within_3_sigma(count: float, num: int, chance: float) -> bool:
    return abs(count - num * chance) <= 3 * math.sqrt(num * chance * (1 - chance))


def test_v19_statistics():
    """Exactly half is corrupted; of it 80 % is masked, 10 % another patch of the image, 10 % unchanged."""
    num_images, num_patches = 5000, 16
    corrupted, hidden, source = corrupted_patches(torch.arange(num_images), num_patches, seed=0)
    own = torch.arange(num_patches)
    replaced = source != own
    assert (corrupted.sum(dim=1) == num_patches // 2).all()
    assert not (hidden & ~corrupted).any()
    assert not (replaced & (hidden | ~corrupted)).any()
    num = int(corrupted.sum())
    assert within_3_sigma(hidden.sum().item(), num, 0.8)
    assert within_3_sigma(replaced.sum().item(), num, 0.1)
    assert within_3_sigma((corrupted & ~hidden & ~replaced).sum().item(), num, 0.1)
    for patch in range(num_patches):
        assert abs(corrupted[:, patch].sum().item() - num_images / 2) <= 4 * math.sqrt(num_images / 4)
    away = ((source - own) % num_patches)[replaced]
    counts = away.bincount(minlength=num_patches)
    assert counts[0] == 0
    num, chance = int(replaced.sum()), 1 / (num_patches - 1)  # each other patch is as likely
    assert (counts[1:] - num * chance).abs().max() <= 4 * math.sqrt(num * chance)


def test_v19_golden_bins():
    """3 bits of each mean colour, red the highest: 8 x 8 x 8 classes."""
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [31, 32, 64], [127, 128, 200]], dtype=torch.uint8)
    image = colours.T[:, None, :].repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[None]  # four patches of 4 px
    assert mean_colour_classes(patchify(image, 4)).tolist() == [[0, 511, 10, 3 * 64 + 4 * 8 + 6]]


def test_v19_outputs_of_uncorrupted_patches_have_no_gradient():
    corruption = corrupted_patches(torch.arange(7), 16, seed=1)
    logits = torch.randn(7, 16, 512, requires_grad=True)
    classes = torch.randint(512, (7, 16))
    masked_patch_loss(logits, classes, corruption.corrupted, corruption.corrupted.sum()).backward()
    assert torch.equal(logits.grad.abs().amax(dim=2) > 0, corruption.corrupted)


def test_v19_a_small_run_beats_chance():
    """On held-out digits, it beats predicting the colour frequencies, which does not use the image."""
    torch.manual_seed(0)
    grey = torch.from_numpy(load_digits().images).mul(255 / 16).round().to(torch.uint8)  # [1797, 8, 8]
    images = grey[:, None].expand(-1, 3, -1, -1)
    classes = mean_colour_classes(patchify(images, 2))
    tower = ViTConfig(image_size=8, patch_size=2, width=48, depth=2, num_heads=4, pool="class", pre_norm=False)
    model = MaskedPatchModel(build_image_tower(tower), PixelNorm([0.5] * 3, [0.5] * 3), 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        rows = torch.arange(step * 64, (step + 1) * 64) % 1500
        corruption = corrupted_patches(torch.arange(step * 64, (step + 1) * 64), 16, seed=0)
        loss = masked_patch_loss(
            model(images[rows], corruption).logits, classes[rows], corruption.corrupted, corruption.corrupted.sum()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = slice(1500, None)
    corruption = corrupted_patches(torch.arange(10**6, 10**6 + 297), 16, seed=0)
    hidden = Corruption(corruption.hidden, corruption.hidden, corruption.source)  # the hardest of them
    with torch.no_grad():
        logits = model(images[unseen], corruption).logits
    loss = masked_patch_loss(logits, classes[unseen], hidden.corrupted, hidden.corrupted.sum())
    frequency = classes[:1500].flatten().bincount(minlength=512) + 0.1
    knowing = -(frequency / frequency.sum()).log()[classes[unseen][hidden.corrupted]].mean()
    assert knowing < math.log(512)
    assert loss < 0.9 * knowing
    assert model.mask_embedding.grad.abs().max() > 0


def test_corrupt_puts_what_it_says_where_it_says():
    tokens = torch.randn(3, 16, 8, requires_grad=True)
    mask = torch.randn(8, requires_grad=True)
    corruption = corrupted_patches(torch.arange(3), 16, seed=3)
    found = corrupt(tokens, corruption, mask)
    for i in range(3):
        for n in range(16):
            expected = mask if corruption.hidden[i, n] else tokens[i, corruption.source[i, n]]
            assert torch.equal(found[i, n], expected)
    untouched = ~corruption.corrupted
    assert torch.equal(found[untouched], tokens[untouched])
    found.sum().backward()
    assert torch.equal(mask.grad, torch.full((8,), float(corruption.hidden.sum())))
    assert corrupt(tokens.bfloat16(), corruption, mask).dtype == torch.bfloat16


def test_a_split_batch_is_corrupted_the_same():
    state = torch.get_rng_state()
    positions = torch.arange(10**12, 10**12 + 64)
    whole = corrupted_patches(positions, 49, seed=7)
    parts = [corrupted_patches(part, 49, seed=7) for part in positions.split([5, 1, 26, 32])]
    for field in Corruption._fields:
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    assert torch.equal(torch.get_rng_state(), state)
    other = corrupted_patches(positions, 49, seed=8)
    assert (whole.corrupted != other.corrupted).any(dim=1).all()


def test_it_is_independent_of_the_patches_that_are_dropped():
    kept = torch.zeros(5000, 16, dtype=torch.bool)
    kept.scatter_(1, kept_patches(torch.arange(5000), 16, 0.5, seed=0), True)
    corrupted = corrupted_patches(torch.arange(5000), 16, seed=0).corrupted
    assert abs((kept & corrupted).sum().item() - 20_000) < 4 * math.sqrt(80_000 * 3 / 16)


@pytest.mark.parametrize(
    ("num_patches", "share", "num"), [(1, 0.5, 0), (2, 0.5, 1), (9, 0.0, 0), (4, 0.99, 3), (49, 0.5, 25)]
)
def test_number_of_corrupted_patches(num_patches: int, share: float, num: int):
    corruption = corrupted_patches(torch.arange(20), num_patches, seed=0, share=share)
    assert (corruption.corrupted.sum(dim=1) == num).all()
    assert corruption.source.max() < num_patches


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    positions = torch.arange(256) + 2**33
    for here, there in zip(
        corrupted_patches(positions, 196, 5), corrupted_patches(positions.cuda(), 196, 5), strict=True
    ):
        assert torch.equal(here, there.cpu())
