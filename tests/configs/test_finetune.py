"""Each shipped fine-tuning config loads and has the stated size, learning rates, decay and augmentation."""

import re
import shlex
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn

from mmvit.config import FinetuneConfig, PretrainConfig, load_config
from mmvit.data.prompts import configs_folder, load_templates
from mmvit.data.transforms import AugmentConfig
from mmvit.losses.masked import BITS
from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.models.image_towers import build_image_tower
from mmvit.models.masked_patches import MaskedPatchModel
from mmvit.models.pixels import PixelNorm
from mmvit.towers.vit import VisionTransformer
from mmvit.train.optim.build import build_optimizers
from mmvit.train.optim.schedule import schedule_factor

PICTURES = 1_281_167  # of ImageNet


class Expected(NamedTuple):
    """Parameters, steps, and the learning rate at five of them: start, middle and end of warm-up, half, nine tenths."""

    num_parameters: int
    steps: int
    rates: dict[int, float]


DEIT = {0: 1.5984e-7, 3127: 4.9999e-4, 6255: 9.9998e-4, 187650: 5.1331e-4, 337770: 2.5301e-5}
PAPERS = {
    "vit_b16_imagenet": Expected(
        *(87_158_248, 93_835), {0: 2.9989e-7, 5001: 1.5e-3, 10002: 2.9998e-3, 46917: 1.7795e-3, 84451: 9.1798e-5}
    ),
    "vit_b16_finetune_384": Expected(
        *(86_859_496, 20_000), {0: 5.9880e-5, 250: 1.5030e-2, 500: 0.03, 10000: 1.5604e-2, 18000: 7.7195e-4}
    ),
    "vit_b16_masked_patches": Expected(
        *(86_193_152, 1_000_000), {0: 1.9998e-8, 5000: 1.0001e-4, 10000: 2e-4, 500000: 1.0159e-4, 900000: 4.9929e-6}
    ),
    "deit_s16": Expected(22_050_664, 375_300, DEIT),
    "deit_b16_distilled": Expected(87_338_192, 375_300, DEIT),
    "swin_t": Expected(
        *(28_288_354, 375_300), {0: 3.9966e-8, 12510: 5.0002e-4, 25020: 1e-3, 187650: 5.5598e-4, 337770: 2.8058e-5}
    ),
    "swin_b_384": Expected(
        *(87_903_584, 37_530), {0: 6.3938e-9, 3127: 2e-5, 6255: 4e-5, 18765: 2.618e-5, 33777: 1.4045e-6}
    ),
    "cvt_13": Expected(
        *(19_997_480, 187_500), {0: 6.3978e-7, 1562: 9.9998e-4, 3125: 2e-3, 93750: 1.0266e-3, 168750: 5.0602e-5}
    ),
    "wise_ft_vit_b16": Expected(
        *(86_705_640, 25_030), {0: 5.9809e-8, 250: 1.5012e-5, 500: 2.9964e-5, 12515: 1.5481e-5, 22527: 7.6416e-7}
    ),
}
EMOJI_RATES = {0: 9.5238e-5, 10: 1.0476e-3, 20: 2e-3, 200: 1.0526e-3, 360: 2.1053e-4}
DIGITS_RATES = {0: 1.8182e-4, 5: 1.0909e-3, 10: 2e-3, 100: 1.0526e-3, 180: 2.1053e-4}
SMALL = {
    "digits_vit": Expected(683_050, 200, DIGITS_RATES),
    "digits_hybrid": Expected(554_250, 200, DIGITS_RATES),
    "digits_teacher": Expected(359_458, 200, DIGITS_RATES),
    "digits_deit": Expected(684_404, 200, DIGITS_RATES),
    "digits_swin": Expected(566_360, 200, DIGITS_RATES),
    "digits_cvt": Expected(566_218, 200, DIGITS_RATES),
    "emoji_vit": Expected(1_213_322, 400, EMOJI_RATES),
    "emoji_hybrid": Expected(1_654_090, 400, EMOJI_RATES),
    "emoji_deit": Expected(1_215_124, 400, EMOJI_RATES),
    "emoji_swin": Expected(1_268_390, 400, EMOJI_RATES),
    "emoji_cvt": Expected(1_716_394, 400, EMOJI_RATES),
}
EXPECTED = PAPERS | SMALL


def head_of(name: str) -> str:
    text = (configs_folder() / f"finetune/{name}.yaml").read_text()
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))


def load(name: str) -> FinetuneConfig:
    """Load a config with the command in its head comment."""
    command = re.search(rf"# Command: .*?finetune/{name}((?:[^\n\\]|\\\n#)*)", head_of(name))
    assert command
    return load_config(FinetuneConfig, f"finetune/{name}", shlex.split(command[1].replace("\\\n#", "")))


@cache
def build(name: str) -> nn.Module:
    config, num_classes = load(name), 1000 if name in PAPERS else 10
    with torch.device("meta"):
        if config.loss.kind == "labels":
            return build_classifier(config.model, [str(number) for number in range(num_classes)])
        tower, norm = build_image_tower(config.model.image), PixelNorm(config.preprocess.mean, config.preprocess.std)
        assert isinstance(tower, VisionTransformer)
        return MaskedPatchModel(tower, norm, 2 ** (3 * BITS))


def count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_each_shipped_config_is_expected_here():
    assert {path.stem for path in (configs_folder() / "finetune").glob("*.yaml")} == {*EXPECTED, "clip"}


@pytest.mark.parametrize("name", EXPECTED)
def test_size_and_rates(name: str):
    config = load(name)
    config.check()
    expected = EXPECTED[name]
    assert count(build(name).parameters()) == expected.num_parameters
    assert config.train.steps == expected.steps
    assert len(expected.rates) == 5
    found = {step: config.optim.lr * schedule_factor(step, expected.steps, config.optim) for step in expected.rates}
    assert found == pytest.approx(expected.rates, rel=1e-4)
    assert config.out == f"runs/{name}"


@pytest.mark.parametrize("name", PAPERS)
def test_the_head_says_how_to_run_it_and_what_to_expect(name: str):
    head = head_of(name)
    assert [word for word in ("# Hardware:", "# Time:", "# Expect:", "Not run here.") if word not in head] == []
    assert f"{PAPERS[name].num_parameters:,} parameters" in head
    assert "accelerate launch -m mmvit finetune" in head


@pytest.mark.parametrize("name", SMALL)
def test_the_head_of_a_small_one_names_its_data_and_its_teacher(name: str):
    config, head = load(name), head_of(name)
    folder = name.split("_")[0]
    assert f"# Data:     mmvit-data {folder} {folder}" in head
    assert config.data.train == [f"{folder}/train-*.tar"]
    assert config.validation.data == [f"{folder}/val-*.tar"]
    if config.loss.teacher:
        teacher = re.fullmatch(r"runs/(\w+)/model", config.loss.teacher)
        assert teacher
        assert f"mmvit finetune finetune/{teacher[1]}\n" in head
        assert load(teacher[1]).classes == config.classes


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "whole"),
    [
        ("vit_b16_imagenet", 300, 10_000, False),
        ("deit_s16", 300, 5 * 1251, True),
        ("deit_b16_distilled", 300, 5 * 1251, True),
        ("swin_t", 300, 20 * 1251, True),
        ("swin_b_384", 30, 5 * 1251, True),
        ("cvt_13", 300, 5 * 625, True),
        ("vit_b16_finetune_384", None, 500, False),
        ("vit_b16_masked_patches", None, 10_000, False),
        ("wise_ft_vit_b16", 10, 500, False),
    ],
)
def test_epochs_and_warm_up_are_those_of_the_papers(name: str, epochs: int | None, warmup: int, whole: bool):
    """`whole` ones drop the last incomplete batch of an epoch."""
    config = load(name)
    assert config.optim.warmup_share * config.train.steps == pytest.approx(warmup, rel=2e-3)
    if epochs is not None:
        steps_of_epoch = PICTURES / config.train.batch_size
        expected = epochs * int(steps_of_epoch) if whole else epochs * steps_of_epoch
        assert config.train.steps == pytest.approx(expected, rel=0 if whole else 5e-4)


@pytest.mark.parametrize("name", ["deit_s16", "deit_b16_distilled"])
def test_deit_augmentation_matches_the_released_code(name: str):
    config = load(name)
    assert config.data.augment == AugmentConfig(
        crop_area=[0.08, 1.0], flip=0.5, timm_augment="rand-m9-mstd0.5-inc1", erase=0.25
    )
    assert config.data.repeats == 3
    assert vars(config.mix) == {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "prob": 1.0}
    assert config.loss.label_smoothing == 0.1
    assert vars(config.model.image)["drop_path"] == 0.1
    assert (config.optim.ema_decay, config.optim.clip_norm, config.optim.weight_decay) == (0.99996, None, 0.05)
    assert config.optim.lr == 5e-4 * config.train.batch_size / 512


def test_the_distilled_deit_has_the_released_teacher():
    loss = load("deit_b16_distilled").loss
    assert (loss.teacher, loss.distillation, loss.weight) == ("timm:regnety_160.deit_in1k", "hard", 0.5)
    assert loss.teacher.removeprefix("timm:") in timm.list_pretrained("regnety_160*")
    assert timm.get_pretrained_cfg("regnety_160.deit_in1k").num_classes == 1000


def test_swin_and_cvt_augmentation_is_that_of_deit_without_repeats():
    deit = load("deit_s16")
    for name, drop_path, clip_norm in (("swin_t", 0.2, 5.0), ("swin_b_384", 0.5, 5.0), ("cvt_13", 0.1, None)):
        config = load(name)
        assert (config.data.augment, config.mix, config.loss) == (deit.data.augment, deit.mix, deit.loss)
        assert (config.data.repeats, config.optim.ema_decay) == (1, None)
        assert (vars(config.model.image)["drop_path"], config.optim.clip_norm) == (drop_path, clip_norm)
    assert vars(load("cvt_13").model.image)["activation"] == "quick_gelu"


TABLES = {  # parameters of two or more dimensions that do not decay, blocks by one number
    "vit": {"image_tower.positions"},
    "hybrid": {"image_tower.positions"},
    "deit": {"image_tower.positions"},
    "swin": {"image_tower.blocks.N.relative_positions"},
    "cvt": set(),
    "teacher": {"image_tower.pool.positions"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_tables_norms_biases_and_tokens_do_not_decay(name: str):
    config = load(name)
    model = build(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in build_optimizers(model, config.optim) for group in optimizer.param_groups]
    assert sum(len(group["params"]) for group in groups) == len(names)
    (tables,) = [tables for kind, tables in TABLES.items() if kind in name.split("_")]
    plain = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    if config.optim.weight_decay:
        assert {re.sub(r"blocks\.\d+", "blocks.N", names[id(p)]) for p in plain if p.ndim > 1} == tables
    else:
        assert len(plain) == len(names)
    for group in groups:
        for parameter in group["params"]:
            assert parameter.ndim > 1 or group["weight_decay"] == 0


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("deit_s16", "deit_small_patch16_224"),
        ("deit_b16_distilled", "deit_base_distilled_patch16_224"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("swin_b_384", "swin_base_patch4_window12_384"),
    ],
)
def test_timms_model_has_as_many_parameters_that_do_not_decay(name: str, reference: str):
    config = load(name)
    model = build(name)
    with torch.device("meta"):
        theirs = timm.create_model(reference)
    kept = theirs.no_weight_decay()
    (optimizer,) = build_optimizers(model, config.optim)
    plain = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    assert count(plain) == count(p for n, p in theirs.named_parameters() if p.ndim < 2 or n in kept)
    assert count(model.parameters()) == count(theirs.parameters())


def test_wise_ft_starts_from_the_shipped_clip():
    """The same image tower, projection and pixels, and a head of 512 values and a bias for each class."""
    config, clip = load("wise_ft_vit_b16"), load_config(PretrainConfig, "pretrain/clip_vit_b16", ["data.train=shards"])
    assert (config.wise_ft, len(load_templates(config.templates))) == (0.5, 80)
    assert (config.model.image, config.model.embed_dim) == (clip.model.image, clip.model.embed_dim)
    assert config.preprocess == clip.preprocess
    with torch.device("meta"):
        dual = build_dual_encoder(clip.model)
    image = count(dual.image_tower.parameters()) + count(dual.image_projection.parameters())
    assert count(build("wise_ft_vit_b16").parameters()) == image + 1000 * (512 + 1)
