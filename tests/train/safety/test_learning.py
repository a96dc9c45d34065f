"""A run that learns nothing says so, once, and one that learns says nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_tools.tar.expand import expand_shards
from data_tools.tar.writer import ShardWriter
from mmvit.config import LossConfig, PretrainConfig, load_config
from mmvit.data.batches import Batch
from mmvit.data.shards import IndexedShards
from mmvit.losses.contrastive import contrastive_loss
from mmvit.losses.sigmoid import sigmoid_loss
from mmvit.train.loop import pretrain
from mmvit.train.record.run_log import read_log
from mmvit.train.runs.pretraining_loss import chance
from mmvit.train.safety.learning import Chance, Learning, Observed, batch_symptoms, dead_towers

LN = Chance("contrastive", math.log(64), "ln(batch)")
FINE = Observed(14.0)


def run(
    learning: Learning,
    steps: range,
    loss: Callable[[int], float] = lambda step: 1.0,
    observed: Observed = FINE,
    grad_norm: float = 1.0,
) -> list[tuple[int, str]]:
    """Feed steps of which every fifth is logged; returns the first line of each message, with its step."""
    found = []
    for step in steps:
        learning.add(step, {"contrastive": loss(step)}, grad_norm)
        if step % 5 == 0:
            found += [(step, text.partition("\n")[0]) for text in learning.symptoms(step, observed)]
    return found


def test_loss_of_chance_is_reported_once_until_it_changes():
    learning = Learning(400, LN, warmup=30.0)
    at_chance = lambda step: math.log(64) * (1.005 if step % 2 else 0.995)  # noqa: E731
    (first,) = run(learning, range(1, 200), at_chance)
    assert first == (70, "the loss is at ln(batch) = 4.159 for 40 steps, after 70 steps: nothing is learned")
    assert run(learning, range(200, 250), lambda step: 3.0) == []
    assert [step for step, _ in run(learning, range(250, 400), at_chance)] == [290]


@pytest.mark.parametrize(
    "loss",
    [
        lambda step: math.log(64) * (1 - 0.0005 * step),
        lambda step: math.log(64) * (0.95 if step % 7 == 0 else 1),
        lambda step: 9.0,
    ],
)
def test_loss_that_moves_is_not_reported(loss: Callable[[int], float]):
    assert run(Learning(400, LN), range(1, 400), loss) == []


def test_step_without_any_gradient_is_reported_when_it_lasts():
    learning = Learning(400, LN)
    assert run(learning, range(1, 3), grad_norm=0.0) == []
    assert run(learning, range(3, 9)) == []
    ((step, text),) = run(learning, range(9, 50), grad_norm=0.0)
    assert (step, text) == (15, "the gradient is exactly zero: nothing is learned")


def test_tower_without_a_gradient_is_reported_when_it_lasts():
    learning = Learning(400, LN)
    dead = Observed(14.0, ["text_tower"])
    assert run(learning, range(1, 6), observed=dead) == []  # a head of zeros passes nothing on in the first step
    assert run(learning, range(6, 20)) == []
    assert run(learning, range(20, 99), observed=dead) == [
        (30, "the gradient of text_tower is exactly zero: it learns nothing")
    ]


def test_logit_scale_at_a_bound_is_reported_when_it_lasts():
    for scale, bound in ((100.0, "highest value, 100"), (1.0, "lowest value, 1")):
        learning = Learning(400, LN, (1.0, 100.0))
        assert run(learning, range(1, 20)) == []
        assert run(learning, range(20, 200), observed=Observed(scale)) == [
            (60, f"the logit scale is at its {bound}, since step 20")
        ]
    assert run(Learning(400, LN), range(1, 200), observed=Observed(1e5)) == []  # nothing bounds it


def test_symptoms_before_a_resume_are_not_reported_again():
    learning = Learning(400, LN, (1.0, 100.0), active=["chance", "equal_captions"])
    assert run(learning, range(100, 200), lambda step: LN.value, Observed(14.0, (), {"equal_captions": "equal"})) == []
    assert learning.active == {"chance", "equal_captions"}
    assert run(learning, range(200, 205)) == []
    assert learning.active == set()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_loss_of_equal_embeddings_is_that_of_chance(kind: Any):
    size = 16
    rows = torch.nn.functional.normalize(torch.ones(size, 8), dim=1)
    if kind == "softmax":
        loss = contrastive_loss(rows, rows, torch.tensor(14.0))
    else:
        bias = torch.tensor(-math.log(size - 1) - 10.0)  # the best one at a scale of 10
        loss = sigmoid_loss(rows, rows, torch.tensor(10.0), bias)
    assert loss.item() == pytest.approx(chance(LossConfig(kind=kind), size, 1).value, rel=1e-4)


def batch(images: Tensor, groups: list[list[int]]) -> Batch:
    ids = torch.zeros(len(groups), 1, 2).long()
    return Batch(images, ids, torch.tensor(groups), ["key"] * len(groups), torch.arange(len(groups)))


def test_batches_without_content_are_found():
    noise = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    distinct, equal = [[1], [2], [3], [4]], [[5], [5], [5], [5]]
    assert batch_symptoms([batch(noise, distinct), batch(noise, equal)]) == {}
    assert [*batch_symptoms([batch(noise, equal)] * 2)] == ["equal_captions"]
    assert [*batch_symptoms([batch(noise[:1].repeat(4, 1, 1, 1), distinct)])] == ["equal_images"]
    flat = noise[:, :, :1, :1].repeat(1, 1, 8, 8)
    (text,) = batch_symptoms([batch(torch.cat([noise[:2], flat[:2]]), distinct)]).values()
    assert text.startswith("2 of 4 images of a batch have a single colour\n")
    assert batch_symptoms([batch(torch.cat([noise[:3], flat[:1]]), distinct)]) == {}
    assert batch_symptoms([batch(torch.rand(4, 8), distinct)]) == {}  # stored embeddings


def test_towers_without_a_gradient_are_found():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("image_tower", "text_tower", "head")})
    assert dead_towers(model) == ["image_tower", "text_tower"]
    for name in model:
        model[name](torch.ones(1, 3)).sum().backward()
    assert dead_towers(model) == []
    for parameter in model["text_tower"].parameters():
        parameter.grad.zero_()
    assert dead_towers(model) == ["text_tower"]
    model["text_tower"].requires_grad_(False)
    assert dead_towers(model) == []


def test_run_whose_captions_are_all_equal_says_so_once(
    tiny_config: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Also over a resume; its log names the symptom."""
    shards = IndexedShards(expand_shards(f"{tiny_data}/train-*.tar"))
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(16):
            writer.copy(f"key{i}", {"png": shards.fields(i)["png"], "txt": b"Images"})
    settings = [f"data.train={tmp_path}/data", "data.captions=[{source: txt}]", f"out={tmp_path}/run", "seed=1"]
    settings += ["train.batch_size=8", "train.save_every=4", "train.log_every=2", "data.num_workers=0"]
    pretrain(load_config(PretrainConfig, tiny_config, [*settings, "train.steps=4"]))
    assert [text for text in caplog.messages if "captions of a batch" in text] == [
        "step 2: all 8 captions of a batch are equal: nothing is learned from them\n  likely causes: a folder's name "
        "or a placeholder as caption, data.captions with a source or a template that does not depend on the sample"
    ]
    caplog.clear()
    pretrain(load_config(PretrainConfig, tiny_config, [*settings, "train.steps=8"]))
    assert "captions of a batch" not in caplog.text
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "changed" not in line]
    both = ["equal_captions", "no_gradient"]  # equal captions are no negatives, so there is nothing to tell apart
    assert [line["not_learning"] for line in lines] == [both[:1], both, both, both], json.dumps(lines)
