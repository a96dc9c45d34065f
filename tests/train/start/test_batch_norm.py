"""What a model with BatchNorm does not go with is refused, each time by the setting's name."""

from pathlib import Path

import pytest
import torch
from torch import nn

from data_tools.core.errors import UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, load_config
from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.train.start.batch_norm import check_batch_norm, check_share


def build(config: PretrainConfig | FinetuneConfig) -> nn.Module:
    with torch.device("meta"):
        if isinstance(config, FinetuneConfig):
            return build_classifier(config.model, ["a", "b"])
        return build_dual_encoder(config.model)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.precision=bf16_params", "train.precision"),
        ("train.checkpointing=selective", "train.checkpointing"),
        ("train.micro_batches=2", "train.micro_batches"),
        ("train.freeze=[image_*]", "train.freeze"),
        ("lora.rank=2", "lora.rank"),
    ],
)
def test_what_would_spoil_the_statistics_is_refused(tmp_path: Path, override: str, key: str):
    for kind, refused in (("cvt", True), ("resnet", True), ("vit", False)):
        overrides = ["data.train=shards", f"model.image={{kind: {kind}}}", override]
        (tmp_path / "config.yaml").write_text("{}")
        for cls in (FinetuneConfig, PretrainConfig):
            config = load_config(cls, tmp_path / "config.yaml", overrides, complete=False)
            spoils = refused and not (cls is FinetuneConfig and key == "train.micro_batches")
            if spoils:
                with pytest.raises(UsageError, match="has BatchNorm") as error:
                    check_batch_norm(build(config), config)
                assert str(error.value.where).startswith(key)
            else:
                check_batch_norm(build(config), config)


def test_batch_norm_needs_two_images_of_a_micro_batch():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    check_share(model, 2)
    with pytest.raises(UsageError, match=r"BatchNorm \(1\), and each rank has a single image") as error:
        check_share(model, 1)
    assert error.value.where == "train.batch_size"
    model[1].requires_grad_(False)
    check_share(model, 1)
    check_share(torch.nn.LayerNorm(3), 1)
