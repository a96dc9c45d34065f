"""Stages that the image tower cannot encode are refused by their sizes alone."""

from typing import Any

import pytest

from data_tools.core.errors import UsageError
from mmvit.config import FinetuneConfig
from mmvit.data.curriculum import Stage
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.image_towers import build_image_tower
from mmvit.towers.contract import Tower, TowerConfig
from mmvit.towers.cvt import CvTConfig
from mmvit.towers.resnet import ResNetConfig
from mmvit.towers.swin import SwinConfig
from mmvit.towers.timm_tower import TimmConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.start.dual_encoder import check_curriculum

SWIN = SwinConfig(image_size=16, patch_size=2, width=16, depths=[1, 1], num_heads=[1, 2], window_size=4)
CVT = CvTConfig(image_size=32, widths=[8, 8, 8], depths=[1, 1, 1], num_heads=[1, 1, 1])
RESNET = ResNetConfig(image_size=32, width=8)
VIT = ViTConfig(image_size=16, patch_size=4, width=16, depth=1, num_heads=2)
TIMM = TimmConfig(kind="timm:test_vit", image_size=160)


def check(config: TowerConfig, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a second stage of a tower that cannot be called."""

    def forward(*arguments: Any) -> None:
        raise AssertionError("sizes are known without a forward pass")

    tower: Tower = build_image_tower(config)
    monkeypatch.setattr(tower, "forward", forward)
    check_curriculum(tower, FinetuneConfig(model=ClassifierConfig(image=config), curriculum=[Stage(0.5), stage]))


@pytest.mark.parametrize(
    ("config", "stage", "message"),
    [
        (VIT, Stage(image_size=18), "not divisible into patches of 4 px"),
        (SWIN, Stage(image_size=8), "less than window_size 4"),
        (SWIN, Stage(patch_dropout=0.5), "needs whole images"),
        (CVT, Stage(image_size=8), "too small for this tower"),
        (CVT, Stage(patch_dropout=0.5), "needs whole images"),
        (RESNET, Stage(image_size=40), "not divisible into patches of 32 px"),
        (RESNET, Stage(patch_dropout=0.5), "needs whole images"),
        (TIMM, Stage(image_size=32), "was built for images of 160x160 px"),
        (TIMM, Stage(patch_dropout=0.5), "needs whole images"),
    ],
)
def test_refused_stages(config: TowerConfig, stage: Stage, message: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match=rf"curriculum\[1\] does not fit the image tower: .*{message}"):
        check(config, stage, monkeypatch)


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        (VIT, Stage(image_size=32, patch_dropout=0.5)),
        (SWIN, Stage(image_size=32)),
        (CVT, Stage(image_size=48)),
        (RESNET, Stage(image_size=64)),
        (TIMM, Stage()),
    ],
)
def test_stages_that_fit(config: TowerConfig, stage: Stage, monkeypatch: pytest.MonkeyPatch):
    check(config, stage, monkeypatch)
