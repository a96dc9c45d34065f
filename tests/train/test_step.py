"""One step: what it does to the weights, which rows it takes for positives, and that parts of a batch are the batch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from data_tools.make.tokenizer import train_tokenizer
from mmvit.config import LossConfig
from mmvit.data.batches import Batch
from mmvit.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer
from mmvit.layers.drop_path import DrawKey, DropPath
from mmvit.layers.patch_dropout import kept_patches
from mmvit.losses.contrastive import contrastive_loss
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig, Embeddings
from mmvit.towers.swin import SwinConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train import gradcache
from mmvit.train.contract import Part, StepResult
from mmvit.train.runs.pretraining_loss import PretrainObjective, Targets
from mmvit.train.safety.guard import Guard
from mmvit.train.step import train_step

NUM_IMAGES = 16
TOLERANCE = 1e-5
SOFTMAX = LossConfig()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["red apple", "green pear", "blue sky", "a dog on a sofa"], path, vocab_size=300)
    return build_tokenizer(TokenizerConfig("file", str(path)), 12)


def build(tokenizer: Tokenizer, **options: Any) -> DualEncoder:
    torch.manual_seed(0)
    image = ViTConfig(image_size=16, patch_size=4, width=16, depth=1, num_heads=2)
    image = options.pop("image", image)
    text = TextConfig(tokenizer.vocab_size, 12, tokenizer.end_of_text, width=16, depth=1, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(embed_dim=8, image=image, text=text, **options))


@pytest.fixture
def batch(tokenizer: Tokenizer) -> Batch:
    """Images with two texts each; in the second view two are one caption, which stands in both halves of the batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 16, 16), generator=generator, dtype=torch.uint8)
    words = ["red apple", "a dog on a sofa", "blue", "green pear sky", "dog"]
    texts = [f"{words[i % 5]} {words[i % 3]}" for i in range(2 * NUM_IMAGES)]
    groups = torch.arange(2 * NUM_IMAGES).unflatten(0, (-1, 2))
    groups[12, 1] = groups[3, 1]
    ids = tokenizer(texts).unflatten(0, (-1, 2))
    return Batch(images, ids, groups, [f"key{i}" for i in range(NUM_IMAGES)], torch.arange(NUM_IMAGES))


def split(batch: Batch, num_parts: int, end_of_text: int) -> list[Batch]:
    """Cut a batch into micro-batches, each with texts as long as its own longest."""
    columns = zip(
        *(tensor.chunk(num_parts) for tensor in (batch.images, batch.ids, batch.groups, batch.positions)), strict=True
    )
    parts = []
    for images, ids, groups, positions in columns:
        longest = int((ids == end_of_text).int().argmax(dim=2).max()) + 1
        parts.append(Batch(images, ids[..., :longest], groups, ["key"] * len(images), positions))
    return parts


def step(
    model: DualEncoder,
    tokenizer: Tokenizer,
    batch: Batch,
    loss: LossConfig = SOFTMAX,
    *,
    num_parts: int = 1,
    drop: float = 0.0,
    lr: float = 0.0,
    same_caption_positives: bool = True,
    clip_norm: float | None = None,
) -> tuple[StepResult, dict[str, Tensor]]:
    """Take a step; returns its result and the gradients that it took."""
    gradients: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    objective = PretrainObjective(loss, None, same_caption_positives=same_caption_positives, tokenizer=tokenizer)

    def part(each: Batch) -> Part:
        keep = kept_patches(each.positions, 16, drop, 0) if drop else None
        draws = DrawKey(each.positions, 0)
        return Part((each.images, each.ids, keep), objective.targets(each, torch.device("cpu")), draws)

    parts = [part(each) for each in split(batch, num_parts, tokenizer.end_of_text)]
    refuse = Guard(None).refuse
    result = train_step(Accelerator(cpu=True), model, [optimizer], objective, parts, clip_norm=clip_norm, refuse=refuse)
    return result, gradients


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest gradient of its parameter.

    Or to a hundredth of the largest of all: the gradient of a key's bias, for one, is nothing but rounding.
    """
    largest = {name: value.abs().max().item() for name, value in expected.items()}
    least = max(largest.values()) / 100
    return max((found[name] - expected[name]).abs().max().item() / max(largest[name], least) for name in expected)


def test_loss_is_the_mean_over_the_texts_of_an_image(tokenizer: Tokenizer, batch: Batch):
    model = build(tokenizer)
    with torch.no_grad():
        image, text, scale, *_ = model(batch.images, batch.ids)
        views = [contrastive_loss(image, text[:, view], scale) for view in (0, 1)]
    result, _ = step(model, tokenizer, batch, same_caption_positives=False)
    assert result.loss == pytest.approx(sum(views).item() / 2, abs=1e-6)


def test_joint_captions_are_all_positives_of_their_image(tokenizer: Tokenizer, batch: Batch):
    model = build(tokenizer)
    with torch.no_grad():
        image, text, scale, *_ = model(batch.images, batch.ids)
        own = torch.arange(NUM_IMAGES)
        wanted = contrastive_loss(image, text.flatten(0, 1), scale, own, own.repeat_interleave(2)).item()
    result, _ = step(model, tokenizer, batch, LossConfig(joint_captions=True), same_caption_positives=False)
    assert result.loss == pytest.approx(wanted, abs=1e-6)


def test_equal_captions_are_positives_only_where_asked(tokenizer: Tokenizer, batch: Batch):
    model = build(tokenizer)
    with torch.no_grad():
        image, text, scale, *_ = model(batch.images, batch.ids)
        views = [contrastive_loss(image, text[:, view], scale, *[batch.groups[:, view]] * 2) for view in (0, 1)]
    with_positives = step(model, tokenizer, batch)[0].loss
    assert with_positives == pytest.approx(sum(views).item() / 2, abs=1e-6)
    assert abs(with_positives - step(model, tokenizer, batch, same_caption_positives=False)[0].loss) > 1e-4


OBJECTIVES = {
    "softmax": (LossConfig(), {}),
    "joint": (LossConfig(joint_captions=True), {}),
    "sigmoid": (LossConfig(kind="sigmoid"), {"initial_logit_bias": -2.0}),
    "captioning": (LossConfig(captioning=0.7), {"caption_depth": 1}),
    "tokens": (LossConfig(token_classification=0.7), {"token_head": True}),
}


@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_give_losses_and_gradients_of_the_batch(
    tokenizer: Tokenizer, batch: Batch, name: str, num_parts: int
):
    loss, options = OBJECTIVES[name]
    model = build(tokenizer, **options)
    whole, expected = step(model, tokenizer, batch, loss, drop=0.25)
    parts, found = step(model, tokenizer, batch, loss, num_parts=num_parts, drop=0.25)
    assert parts.losses == pytest.approx(whole.losses, rel=TOLERANCE)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=TOLERANCE)
    assert farthest(found, expected) <= TOLERANCE


TOWERS = {
    "vit": ViTConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, drop_path=0.6),
    "swin": SwinConfig(
        image_size=16, patch_size=2, window_size=2, width=8, depths=[1, 1], num_heads=[2, 2], drop_path=0.6
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_micro_batches_drop_the_paths_of_the_batch(tokenizer: Tokenizer, batch: Batch, name: str):
    model = build(tokenizer, image=TOWERS[name])
    whole, expected = step(model, tokenizer, batch)
    for num_parts in (2, 4):
        parts, found = step(model, tokenizer, batch, num_parts=num_parts)
        assert parts.losses == pytest.approx(whole.losses, rel=TOLERANCE)
        assert farthest(found, expected) <= TOLERANCE
    others = step(model, tokenizer, batch._replace(positions=batch.positions + NUM_IMAGES))[0]
    assert abs(others.loss - whole.loss) > 1e-3
    for module in model.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    assert abs(step(model, tokenizer, batch)[0].loss - whole.loss) > 1e-3


def test_plain_accumulation_is_another_loss(tokenizer: Tokenizer, batch: Batch):
    """The check above can fail: negatives of the own part alone are what it is there to refuse."""
    model = build(tokenizer)
    _, expected = step(model, tokenizer, batch)
    separate = [step(model, tokenizer, part)[1] for part in split(batch, 2, tokenizer.end_of_text)]
    mean = {name: (separate[0][name] + separate[1][name]) / 2 for name in expected}
    assert farthest(mean, expected) > 1e-2


class Solved(nn.Module):
    """Rows that are learned as they are: image and text of a pair are nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.randn(NUM_IMAGES, 32, generator=torch.Generator().manual_seed(1))
        self.image, self.text = nn.Parameter(rows), nn.Parameter(rows + 0.1)
        self.logit_scale = nn.Parameter(torch.tensor(32.0))

    def forward(self, rows: Tensor, ids: Tensor, keep: None = None, heads: bool = True) -> Embeddings:
        image, text = (F.normalize(each[rows], dim=1) for each in (self.image, self.text))
        return Embeddings(image, text[:, None], self.logit_scale.sum())


@pytest.mark.parametrize("num_parts", [1, 4])
def test_a_solved_batch_has_the_gradients_of_float64(tokenizer: Tokenizer, num_parts: int):
    model, exact, rows = Solved(), Solved().double(), torch.arange(NUM_IMAGES)
    image, text, scale = exact(rows, rows)[:3]
    logits = scale * image @ text[:, 0].T
    apart = [(each - each.diagonal()[:, None]).fill_diagonal_(-math.inf).exp() for each in (logits, logits.T)]
    value = sum(each.sum(dim=1).log1p().mean() for each in apart) / 2
    value.backward()
    objective = PretrainObjective(SOFTMAX, None, same_caption_positives=True, tokenizer=tokenizer)
    parts = [Part((part, part, None), Targets(part[:, None])) for part in rows.chunk(num_parts)]
    losses = gradcache.backward_cached(Accelerator(cpu=True), model, objective, parts, objective.totals(parts))
    assert losses["contrastive"].item() == pytest.approx(value.item(), rel=1e-4)
    assert 1e-10 < value.item() < 1e-6
    for found, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        assert (found.grad - wanted.grad).abs().max() <= 1e-4 * wanted.grad.abs().max()


def test_the_second_pass_draws_what_the_first_drew(tokenizer: Tokenizer, batch: Batch, monkeypatch: pytest.MonkeyPatch):
    model = build(tokenizer)
    model.image_tower.blocks[0].feed_forward.activation = nn.Sequential(nn.GELU(), nn.Dropout(0.5))

    def cached_gradients() -> dict[str, Tensor]:
        torch.manual_seed(7)
        objective = PretrainObjective(SOFTMAX, None, same_caption_positives=True, tokenizer=tokenizer)
        parts = [Part((batch.images, batch.ids, None), objective.targets(batch, torch.device("cpu")))]
        model.zero_grad()
        gradcache.backward_cached(Accelerator(cpu=True), model, objective, parts, objective.totals(parts))
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    torch.manual_seed(7)
    expected = step(model, tokenizer, batch)[1]
    assert farthest(cached_gradients(), expected) <= TOLERANCE
    monkeypatch.setattr(gradcache, "_set_random_state", lambda *_: None)
    assert farthest(cached_gradients(), expected) > 1e-2


def test_refused_step_changes_nothing(tokenizer: Tokenizer, batch: Batch):
    model = build(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = replace_images(batch)
    result, gradients = step(model, tokenizer, bad, lr=1.0)
    assert math.isnan(result.loss)
    assert result.skipped == "the loss is nan and the gradient norm is nan"
    assert gradients == {}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    result, _ = step(model, tokenizer, batch, lr=1.0)
    assert result.skipped is None
    assert not torch.equal(before["image_projection.weight"], model.image_projection.weight)


def replace_images(batch: Batch) -> Batch:
    return batch._replace(images=torch.full((NUM_IMAGES, 3, 16, 16), float("nan")))


def test_gradients_are_clipped_to_the_norm(tokenizer: Tokenizer, batch: Batch):
    """The logged norm is that before clipping."""
    free, whole = step(build(tokenizer), tokenizer, batch)
    limit = free.grad_norm / 3
    clipped, gradients = step(build(tokenizer), tokenizer, batch, clip_norm=limit)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)
    assert farthest(gradients, {name: gradient / 3 for name, gradient in whole.items()}) < TOLERANCE
    _, gradients = step(build(tokenizer), tokenizer, batch, clip_norm=2 * free.grad_norm)
    assert farthest(gradients, whole) == 0
