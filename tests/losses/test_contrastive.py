"""The contrastive losses on a single rank, in addition to the contract table: softmax and sigmoid."""

import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmvit.losses import pairs
from mmvit.losses.contrastive import contrastive_loss
from mmvit.losses.sigmoid import sigmoid_loss

TOLERANCE = 1e-6
NUM_ROWS = 16
SCALE = 14.3
BIAS = -3.0


def unit_rows(seed: int, rows: int = NUM_ROWS, width: int = 12) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def with_gradients(loss: Callable[..., Tensor], image: Tensor, text: Tensor, *scalars: float) -> list[Tensor]:
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves += [torch.tensor(scalar, requires_grad=True) for scalar in scalars]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


LOSSES = {
    "softmax": (contrastive_loss, ClipLoss(), (SCALE,)),
    "sigmoid": (sigmoid_loss, SigLipLoss(), (SCALE, BIAS)),
}
every_loss = pytest.mark.parametrize(("loss", "open_clip_loss", "scalars"), LOSSES.values(), ids=LOSSES)


@every_loss
def test_equals_open_clip_with_its_gradients(loss, open_clip_loss, scalars):
    expected = with_gradients(open_clip_loss, unit_rows(0), unit_rows(1), *scalars)
    for ours, theirs in zip(with_gradients(loss, unit_rows(0), unit_rows(1), *scalars), expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


@every_loss
def test_groups_of_one_are_the_plain_loss(loss, open_clip_loss, scalars):
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(2))
    plain = with_gradients(loss, unit_rows(0), unit_rows(1), *scalars)
    grouped = with_gradients(lambda *r: loss(*r, torch.arange(NUM_ROWS)[order]), unit_rows(0), unit_rows(1), *scalars)
    for a, b in zip(plain, grouped, strict=True):
        assert (a - b).abs().max() <= TOLERANCE


@every_loss
def test_logits_are_float32_under_autocast(loss, open_clip_loss, scalars):
    image, text, scalars = unit_rows(0), unit_rows(1), [torch.tensor(scalar) for scalar in scalars]
    expected = loss(image, text, *scalars)
    with torch.autocast("cpu", torch.bfloat16):
        assert (image @ text.T).dtype == torch.bfloat16
        assert torch.equal(loss(image, text, *scalars), expected)
        half = image.bfloat16().requires_grad_()
        rounded = loss(half, text.bfloat16(), *scalars)
        rounded.backward()
    assert rounded.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16


@every_loss
def test_no_gradient_no_second_walk(loss, open_clip_loss, scalars):
    image, text, scalars = unit_rows(0), unit_rows(1), [torch.tensor(scalar) for scalar in scalars]
    with patch.object(pairs.Pairs, "gradients", side_effect=AssertionError):
        value = loss(image, text, *scalars)
        with torch.no_grad():
            loss(image.requires_grad_(), text, *scalars)
        with pytest.raises(AssertionError):  # the patch is seen
            loss(image, text, *scalars)
    assert value.item() == loss(image, text, *scalars).item()


@every_loss
def test_weights_of_the_loss_reach_the_gradients_and_a_second_backward_is_refused(loss, open_clip_loss, scalars):
    expected = with_gradients(loss, unit_rows(0), unit_rows(1), *scalars)[1]
    image = unit_rows(0).requires_grad_()
    value = loss(image, unit_rows(1), *map(torch.tensor, scalars))
    (0.3 * value).backward(retain_graph=True)
    assert (image.grad - 0.3 * expected).abs().max() <= TOLERANCE
    with pytest.raises(RuntimeError, match="compute it again"):
        value.backward()


@every_loss
@pytest.mark.parametrize("layout", ["auto", "tiles", "ring"])
def test_no_more_logits_than_a_tile_are_held(loss, open_clip_loss, scalars, layout):
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
            return result

    def largest(layout: str) -> int:
        with patch.object(pairs, "CPU_TILE", (30, 40)), Largest() as mode:
            loss(image, text, *map(torch.tensor, scalars), layout=layout).backward()
        return mode.size

    image, text = unit_rows(0, 300).requires_grad_(), unit_rows(1, 300).requires_grad_()
    assert largest(layout) <= 300 * 12  # a gradient; two tiles in one piece are 2,400
    assert largest("rows") >= 300 * 300


@every_loss
def test_rows_without_a_partner_are_refused(loss, open_clip_loss, scalars):
    scalars = [torch.tensor(scalar) for scalar in scalars]
    with pytest.raises(ValueError, match="16 images and 32 texts: pass the groups of both"):
        loss(unit_rows(0), unit_rows(1, 32), *scalars)
    with pytest.raises(ValueError, match="pass the groups of both"):
        loss(unit_rows(0), unit_rows(1, 32), *scalars, torch.arange(16))
    with pytest.raises(ValueError, match="pass the groups of both"):
        loss(unit_rows(0), unit_rows(1), *scalars, None, torch.arange(16))


def test_texts_of_other_images_are_refused():
    groups = torch.arange(8)
    for text_groups in (groups.repeat(2), groups.repeat_interleave(2)[:15], groups.flip(0)):
        with pytest.raises(ValueError, match="the texts of an image must be next to each other"):
            contrastive_loss(unit_rows(0, 8), unit_rows(1, len(text_groups)), torch.tensor(SCALE), groups, text_groups)


@every_loss
@pytest.mark.parametrize("scale", [20.0, 50.0, 80.0])
def test_gradients_of_a_solved_batch_keep_their_digits(loss, open_clip_loss, scalars, scale):
    """The losses are 1e-5 to 1e-26; a normaliser minus a positive, or a probability minus 1, is rounding there."""
    image, text = unit_rows(0, 8, 64), unit_rows(0, 8, 64)
    scalars = (scale, -0.6 * scale)[: len(scalars)]
    own = torch.eye(8, dtype=torch.bool)

    def formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = scale * image @ text.T
        if bias is not None:
            return torch.where(own, -logits - bias, logits + bias).exp().log1p().sum() / 8
        others = (logits - logits.diagonal()[:, None]).exp(), (logits - logits.diagonal()).T.exp()
        return sum(other.masked_fill(own, 0).sum(dim=1).log1p().mean() for other in others) / 2

    expected = with_gradients(lambda *r: formula(*(x.double() for x in r)), image, text, *scalars)
    for found, wanted in zip(with_gradients(loss, image, text, *scalars), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    if loss is contrastive_loss:  # with cross_entropy in float32 it is rounding
        rounding = with_gradients(open_clip_loss, image, text, *scalars)[1] - expected[1]
        assert rounding.abs().max() > 1e-3 * expected[1].abs().max()


def test_equal_captions_are_no_negatives():
    groups = torch.tensor([5, 1, 2, 5, 3, 2, 9, 5, 7, 3, 8, 2, 5, 6, 4, 0])
    image, text, scale = unit_rows(0), unit_rows(1)[groups], torch.tensor(SCALE)
    logits = scale * image @ text.T
    terms = []
    for i in range(NUM_ROWS):
        differ = groups != groups[i]
        by_image = torch.cat([logits[i, differ], logits[i, i, None]])
        by_text = torch.cat([logits[differ, i], logits[i, i, None]])
        terms.append((by_image.logsumexp(0) + by_text.logsumexp(0)) / 2 - logits[i, i])
    value = contrastive_loss(image, text, scale, groups)
    assert value.item() == pytest.approx(torch.stack(terms).mean().item(), abs=TOLERANCE)
    assert contrastive_loss(image, text, scale).item() > value.item() + 0.02


def test_a_batch_without_negatives_has_no_loss():
    same = with_gradients(
        lambda *r: contrastive_loss(*r, torch.zeros(NUM_ROWS, dtype=torch.long)), unit_rows(0), unit_rows(1), SCALE
    )
    assert [tensor.abs().max().item() for tensor in same] == [0, 0, 0, 0]


def test_identical_rows_give_log_n():
    row = unit_rows(0, 1).expand(NUM_ROWS, -1)
    value = contrastive_loss(row, row, torch.tensor(SCALE)).item()
    assert value == pytest.approx(math.log(NUM_ROWS), abs=TOLERANCE * SCALE)


def test_towers_can_be_swapped():
    scale = torch.tensor(SCALE)
    groups = torch.tensor([5, 1, 2, 5, 3, 2, 9, 5, 7, 3, 8, 2, 5, 6, 4, 0])
    assert contrastive_loss(unit_rows(0), unit_rows(1), scale, groups).item() == pytest.approx(
        contrastive_loss(unit_rows(1), unit_rows(0), scale, groups).item(), abs=TOLERANCE
    )


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_opposite_rows_at_the_largest_scale_neither_overflow_nor_vanish(layout: str, swapped: bool):
    """One row's logits are all near -100, the others' near 100: a common maximum would underflow in that row."""
    axis = F.normalize(torch.ones(1, 12), dim=1)
    image = F.normalize(torch.cat([axis, -axis.expand(NUM_ROWS - 1, -1)]) + 0.02 * unit_rows(0), dim=1)
    text = F.normalize(0.02 * unit_rows(1) - axis, dim=1)
    image, text = (text, image) if swapped else (image, text)
    logits = (100 * image.double() @ text.double().T).requires_grad_()
    own = torch.arange(NUM_ROWS)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    (slope,) = torch.autograd.grad(expected, logits)
    with patch.object(pairs, "CPU_TILE", (5, 7)):
        found = with_gradients(lambda *r: contrastive_loss(*r, layout=layout), image, text, 100.0)
    assert found[0].item() == pytest.approx(expected.item(), abs=100 * TOLERANCE)
    assert (found[1] - 100 * slope @ text.double()).abs().max() <= 100 * TOLERANCE
    assert (found[2] - 100 * slope.T @ image.double()).abs().max() <= 100 * TOLERANCE


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(wrong: float):
    image = unit_rows(0)
    image[3, 4] = wrong
    assert not contrastive_loss(image, unit_rows(1), torch.tensor(SCALE)).isfinite()
