"""Who updates what, with which decay and rate, and that a restored state continues bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.config import OptimConfig
from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.models.image_towers import tower_config
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.optim.build import (
    build_optimizers,
    is_hidden_matrix,
    layer_factors,
    set_learning_rates,
)
from mmvit.train.optim.muon import Muon
from mmvit.train.optim.schedule import schedule_factor
from mmvit.train.optim.state import flatten_state, restore_state

BLOCK_MATRICES = {
    f"{tower}_tower.blocks.0.{part}.weight"
    for tower in ("image", "text")
    for part in ("attention.q", "attention.k", "attention.v", "attention.out", "feed_forward.up", "feed_forward.down")
}
PROJECTIONS = {"image_projection.weight", "text_projection.weight"}
EMBEDDINGS = {"image_tower.embed.projection.weight", "text_tower.token_embedding.weight"}
NEVER_DECAYED = {
    *("image_tower.positions", "image_tower.class_token", "text_tower.positions", "logit_scale"),
    *("image_tower.pre_norm.weight", "image_tower.norm.weight", "text_tower.norm.weight"),
    *("image_tower.blocks.0.attention_norm.weight", "text_tower.blocks.0.feed_forward_norm.weight"),
    *("image_tower.blocks.0.attention.q.bias", "text_tower.blocks.0.feed_forward.up.bias", "text_tower.norm.bias"),
}


def small_model(stem_channels: tuple[int, ...] = ()) -> DualEncoder:
    torch.manual_seed(0)
    image = ViTConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2, stem_channels=list(stem_channels))
    text = TextConfig(vocab_size=50, end_of_text=49, context_length=8, width=32, depth=1, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(24, image=image, text=text))


def full_model(depths: tuple[int, int] = (1, 1)) -> DualEncoder:
    """With every part that a dual encoder can have."""
    torch.manual_seed(0)
    image = ViTConfig(image_size=16, patch_size=8, width=32, depth=depths[0], num_heads=2, pool="attention")
    text = TextConfig(vocab_size=50, end_of_text=49, context_length=8, width=32, depth=depths[1], num_heads=2)
    config = DualEncoderConfig(24, initial_logit_bias=-10.0, caption_depth=1, token_head=True, image=image, text=text)
    return build_dual_encoder(config)


def members(model: DualEncoder, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_adamw_takes_all_and_decays_matrices_only():
    model = small_model()
    (adamw,) = build_optimizers(model, OptimConfig(weight_decay=0.3, betas=[0.8, 0.9], eps=1e-5, lr=0.1))
    decayed, plain = adamw.param_groups
    assert members(model, decayed) == BLOCK_MATRICES | PROJECTIONS | EMBEDDINGS
    assert members(model, plain) == {name for name, _ in model.named_parameters()} - members(model, decayed)
    assert members(model, plain) >= NEVER_DECAYED
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert (adamw.defaults["betas"], adamw.defaults["eps"], adamw.defaults["lr"]) == ((0.8, 0.9), 1e-5, 0.1)


def test_muon_takes_the_hidden_matrices():
    model = small_model()
    muon, adamw = build_optimizers(model, OptimConfig(name="muon", muon_lr=0.5, muon_weight_decay=0.07))
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    assert members(model, muon.param_groups[0]) == BLOCK_MATRICES | PROJECTIONS
    decayed, plain = adamw.param_groups
    assert members(model, decayed) == EMBEDDINGS
    assert members(model, plain) >= NEVER_DECAYED
    assert (muon.param_groups[0]["lr"], muon.param_groups[0]["weight_decay"]) == (0.5, 0.07)
    groups = [muon.param_groups[0], decayed, plain]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_takes_the_kernels_of_a_stem_that_do_not_read_pixels():
    model = small_model((4, 8, 16))
    muon, _ = build_optimizers(model, OptimConfig(name="muon"))
    kernels = {f"image_tower.embed.{part}.weight" for part in ("convolutions.3", "convolutions.6", "projection")}
    assert members(model, muon.param_groups[0]) == BLOCK_MATRICES | PROJECTIONS | kernels


def test_frozen_parameters_are_left_out():
    model = small_model()
    model.image_tower.requires_grad_(False)
    for optimizer in build_optimizers(model, OptimConfig(name="muon")):
        for group in optimizer.param_groups:
            assert not any(name.startswith("image_tower.") for name in members(model, group))


def decay_of(model: DualEncoder, optimizers: list[torch.optim.Optimizer]) -> dict[str, float]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {name: group["weight_decay"] for group in groups for name in members(model, group)}


@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "muon", "lamb", "sgd"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_every_parameter_of_every_head_is_in_one_group_and_decays_if_it_multiplies(
    name: str, layer_decay: float | None
):
    model = full_model()
    optimizers = build_optimizers(model, OptimConfig(name=name, layer_decay=layer_decay))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decays = decay_of(model, optimizers)
    never = {key for key, p in model.named_parameters() if p.ndim < 2 or key.endswith("positions")}
    assert {"logit_scale", "logit_bias", "image_tower.pool.probe", "token_head.bias"} < never
    assert {key for key, decay in decays.items() if decay == 0} == never
    assert decays.keys() == {key for key, _ in model.named_parameters()}


def test_muon_takes_the_matrices_of_the_heads_but_no_map_to_the_vocabulary():
    model = full_model()
    muon, adamw = build_optimizers(model, OptimConfig(name="muon"))
    taken = members(model, muon.param_groups[0])
    assert "caption_decoder.blocks.0.context_attention.q.weight" in taken
    assert {"image_tower.pool.attention.q.weight", "image_tower.pool.feed_forward.up.weight"} < taken
    assert members(model, adamw.param_groups[0]) == EMBEDDINGS | {"caption_decoder.output.weight", "token_head.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_order_of_parameters_is_that_of_the_first_checkpoints(name: str):
    """A checkpoint names its tensors by this order."""
    model = small_model((4, 8, 16))
    named = dict(model.named_parameters())
    matrices = [key for key, p in named.items() if name == "muon" and is_hidden_matrix(key, p)]
    rest = [key for key in named if key not in matrices]
    plain = [key for key in rest if named[key].ndim < 2 or key.endswith(("positions", "class_token", "logit_scale"))]
    expected = [[matrices]] * bool(matrices) + [[[key for key in rest if key not in plain], plain]]
    optimizers = build_optimizers(model, OptimConfig(name=name))
    names = {id(p): key for key, p in named.items()}
    assert expected == [[[names[id(p)] for p in g["params"]] for g in o.param_groups] for o in optimizers]
    train(model, optimizers, range(1))
    adamw = len(optimizers) - 1
    expected_names = {f"{adamw}.{i}.{part}" for i in range(len(rest)) for part in ("step", "exp_avg", "exp_avg_sq")}
    expected_names |= {f"0.{i}.momentum_buffer" for i in range(len(matrices))}
    assert flatten_state(optimizers).keys() == expected_names


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_layer_decay_slows_each_block_by_its_depth_in_its_own_tower(name: str):
    model = full_model(depths=(3, 2))
    config = OptimConfig(name=name, lr=0.1, muon_lr=0.1, layer_decay=0.5)
    optimizers = build_optimizers(model, config)
    set_learning_rates(optimizers, 1.0)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {key: group["lr"] for group in groups for key in members(model, group)}
    expected = {
        "image_tower.positions": 1 / 16,
        "image_tower.embed.projection.weight": 1 / 16,
        "image_tower.pre_norm.bias": 1 / 16,
        "image_tower.blocks.0.attention.q.weight": 1 / 8,
        "image_tower.blocks.2.attention_norm.weight": 1 / 2,
        "image_tower.norm.weight": 1,
        "image_tower.pool.attention.q.weight": 1,
        "image_projection.weight": 1,
        "text_tower.token_embedding.weight": 1 / 8,
        "text_tower.blocks.0.feed_forward.up.weight": 1 / 4,
        "text_tower.blocks.1.feed_forward.up.weight": 1 / 2,
        "text_tower.norm.bias": 1,
        "caption_decoder.blocks.0.attention.q.weight": 1,
        "token_head.weight": 1,
        "logit_scale": 1,
    }
    assert {key: rates[key] for key in expected} == pytest.approx({key: 0.1 * f for key, f in expected.items()})
    peaks = [group["lr"] for group in optimizers[-1].param_groups]
    assert peaks == sorted(peaks, reverse=True)  # a checkpoint names its tensors by this order
    set_learning_rates(optimizers, 0.5)
    assert {key: group["lr"] for group in groups for key in members(model, group)} == pytest.approx(
        {key: rate / 2 for key, rate in rates.items()}
    )


def test_layer_decay_counts_frozen_blocks_too():
    model = full_model(depths=(3, 2))
    model.image_tower.blocks[2].requires_grad_(False)
    (adamw,) = build_optimizers(model, OptimConfig(lr=1.0, layer_decay=0.5))
    rates = {key: group["lr"] for group in adamw.param_groups for key in members(model, group)}
    assert rates["image_tower.blocks.0.attention.q.weight"] == pytest.approx(1 / 8)


def test_layer_decay_slows_relative_positions_with_their_block():
    names = ["image_tower.blocks.0.attention.q.weight", "image_tower.blocks.1.attention.q.weight"]
    names += ["image_tower.relative.0.offset_bias", "image_tower.relative.1.offset_bias"]
    factors = list(layer_factors(names, 0.5).values())
    assert factors == [0.25, 0.5, 0.25, 0.5]


def test_tables_of_timm_do_not_decay():
    """Those that the model itself names, and its biases and norms."""
    model = build_classifier(ClassifierConfig(tower_config("timm:test_vit")), ["a", "b"])
    (optimizer,) = build_optimizers(model, OptimConfig(weight_decay=0.1))
    plain = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    kept = {f"image_tower.model.{name}" for name in model.image_tower.model.no_weight_decay()}
    named = dict(model.named_parameters())
    assert kept & named.keys()
    assert {id(named[name]) for name in kept & named.keys()} <= plain


def test_layer_decay_needs_a_sequence_of_blocks():
    with torch.device("meta"):
        model = build_classifier(ClassifierConfig(tower_config("rn50")), ["a", "b"])
    with pytest.raises(UsageError, match="the image tower has no sequence of blocks") as error:
        build_optimizers(model, OptimConfig(layer_decay=0.5))
    assert error.value.where == "optim.layer_decay"


def test_rates_are_set_from_the_peak_each_time():
    optimizers = build_optimizers(small_model(), OptimConfig(name="muon", lr=0.1, muon_lr=0.4))
    for factor in (0.5, 0.25, 1.0):
        set_learning_rates(optimizers, factor)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * factor, 0.1 * factor, 0.1 * factor])


def train(model: DualEncoder, optimizers: list[torch.optim.Optimizer], steps: range, without: str = "") -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if name == without else gradient
        set_learning_rates(optimizers, schedule_factor(step, 8, OptimConfig()))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "muon", "lamb", "sgd"])
def test_a_restored_state_continues_bit_for_bit(tmp_path: Path, name: str, layer_decay: float | None):
    config = OptimConfig(name=name, layer_decay=layer_decay)
    model = small_model((4, 8, 16))
    optimizers = build_optimizers(model, config)
    train(model, optimizers, range(3))
    save_file(flatten_state(optimizers), tmp_path / "optimizer.safetensors")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizers, range(3, 6))

    again, forgetful = small_model((4, 8, 16)), small_model((4, 8, 16))
    for copy in (again, forgetful):
        copy.load_state_dict(weights)
    restored = build_optimizers(again, config)
    restore_state(restored, load_file(tmp_path / "optimizer.safetensors"))
    train(again, restored, range(3, 6))
    train(forgetful, build_optimizers(forgetful, config), range(3, 6))
    for (key, expected), found, other in zip(
        model.named_parameters(), again.parameters(), forgetful.parameters(), strict=True
    ):
        assert torch.equal(found, expected), key
        assert not torch.equal(other, expected), key


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: {name: torch.ones(3) if name.endswith("exp_avg") else value for name, value in saved.items()},
        lambda saved: saved | {"0.999.exp_avg": torch.ones(3)},
        lambda saved: saved | {"1.0.exp_avg": torch.ones(3)},
        lambda saved: saved | {"momentum": torch.ones(3)},
    ],
    ids=["shape", "parameter", "optimizer", "name"],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(change: Callable[[dict], dict]):
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig())
    train(model, optimizers, range(2))
    saved = {name: value.clone() for name, value in flatten_state(optimizers).items()}
    with pytest.raises(CheckpointError, match="does not fit the model"):
        restore_state(optimizers, change({name: value + 1 for name, value in saved.items()}))
    for name, value in flatten_state(optimizers).items():
        assert torch.equal(value, saved[name])


# Each optimiser against its formula in float64, on one matrix that decays, its steps as they go through the schedule.
BETAS, EPS, DECAY, RATE = (0.8, 0.9), 1e-6, 0.1, 0.05
SPIKE = (1.0, 1.0, 8.0, 0.5, 1.0)  # of the gradients of five steps


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [scale * torch.randn(6, 5, generator=generator) for scale in SPIKE]


def start() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(8))


def by_stable_adamw(*, clip: bool = True, clip_decay: bool = True) -> Tensor:
    """Wortsman et al. 2023, algorithm 2, line by line."""
    w, m, u = start().double(), 0.0, 0.0
    for t, g in enumerate((g.double() for g in gradients()), 1):
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in BETAS)
        m, u = beta1 * m + (1 - beta1) * g, beta2 * u + (1 - beta2) * g**2
        rms = (g**2 / u.clamp(min=EPS**2)).mean().sqrt().item()
        rate = RATE / max(1.0, rms) if clip else RATE
        w = w - (rate if clip_decay else RATE) * DECAY * w - rate * m / (u.sqrt() + EPS)
    return w


def by_lamb(*, adapt: bool = True, correct: bool = True) -> Tensor:
    """You et al. 2020, algorithm 2, phi the identity."""
    w, m, v = start().double(), 0.0, 0.0
    for t, g in enumerate((g.double() for g in gradients()), 1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        first, second = (1 - BETAS[0] ** t, 1 - BETAS[1] ** t) if correct else (1, 1)
        direction = m / first / ((v / second).sqrt() + EPS) + DECAY * w
        w = w - RATE * (w.norm() / direction.norm() if adapt else 1) * direction
    return w


def by_sgd(*, momentum: float = BETAS[0], decay: float = DECAY) -> Tensor:
    """Sutskever et al. 2013, section 2, with the decay in the gradient as torch has it."""
    w, velocity = start().double(), 0.0
    for g in gradients():
        velocity = momentum * velocity + g.double() + decay * w
        w = w - RATE * velocity
    return w


def by_adamw() -> Tensor:
    return by_stable_adamw(clip=False)


@pytest.mark.parametrize(
    ("name", "formula", "wrong"),
    [
        ("adamw", by_adamw, [by_stable_adamw, by_lamb]),
        ("stable_adamw", by_stable_adamw, [by_adamw, lambda: by_stable_adamw(clip_decay=False)]),
        ("lamb", by_lamb, [lambda: by_lamb(adapt=False), lambda: by_lamb(correct=False)]),
        ("sgd", by_sgd, [lambda: by_sgd(momentum=0.0), lambda: by_sgd(decay=0.0)]),
    ],
)
def test_five_steps_equal_the_formula_in_float64(
    name: str, formula: Callable[[], Tensor], wrong: list[Callable[[], Tensor]]
):
    model = nn.Linear(5, 6, bias=False)
    model.load_state_dict({"weight": start()})
    config = OptimConfig(name=name, lr=RATE, betas=list(BETAS), eps=EPS, weight_decay=DECAY)
    (optimizer,) = build_optimizers(model, config)
    for gradient in gradients():
        model.weight.grad = gradient
        optimizer.step()
    assert (model.weight - formula()).abs().max() < 1e-5
    for other in wrong:
        assert (model.weight - other()).abs().max() > 1e-3


@pytest.mark.parametrize("lr", [0.01, 1e-5])
def test_lamb_takes_the_steps_of_timm(lr: float):
    """With a zero tensor, one without gradient, and what does not decay: those take steps of their own."""
    from timm.optim.lamb import Lamb as Reference

    models = [full_model(), full_model()]
    nn.init.zeros_(models[0].image_projection.weight)
    models[1].load_state_dict(models[0].state_dict())
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    ours = build_optimizers(models[0], OptimConfig(name="lamb", lr=lr))
    like = build_optimizers(models[1], OptimConfig(name="lamb", lr=lr))[0].param_groups
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in like]
    reference = Reference(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=None)
    for model, optimizers in ((models[0], ours), (models[1], [reference])):
        train(model, optimizers, range(6), without="token_head.weight")
    for (name, found), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        way = (expected - before[name]).norm()
        assert (way > 0) == (name != "token_head.weight")
        assert (found - expected).norm() <= 1e-4 * way + 1e-7 * expected.norm(), name


def test_stable_adamw_is_adamw_to_the_bit_where_no_gradient_grows():
    models = [nn.Linear(5, 6), nn.Linear(5, 6)]
    models[1].load_state_dict(models[0].state_dict())
    names = ("adamw", "stable_adamw")
    optimizers = [build_optimizers(m, OptimConfig(name=n))[0] for m, n in zip(models, names, strict=True)]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5**step)
            optimizer.step()
        if step == 0:  # here g^2 / v is 1 up to rounding
            models[1].load_state_dict(models[0].state_dict())
    for found, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "lr"), [("adamw", 3e-3), ("stable_adamw", 3e-3), ("lamb", 1e-2), ("sgd", 0.05)])
def test_pairs_are_learned(name: str, lr: float):
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig(name=name, lr=lr, weight_decay=1e-4))
    images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[[1 + i, 20 + i, 49]] for i in range(8)])
    losses = []
    for _ in range(40):
        found = model(images, ids)
        logits = found.logit_scale * found.image @ found.text[:, 0].T
        loss = nn.functional.cross_entropy(logits, torch.arange(8))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::8]
