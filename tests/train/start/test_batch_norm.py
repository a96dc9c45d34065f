"""What trained BatchNorm does not go with is refused by the setting's name; frozen BatchNorm keeps its values."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data_tools.core.errors import UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, load_config
from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.train.loop import pretrain
from mmvit.train.run import Run
from mmvit.train.start.batch_norm import check_batch_norm, check_share, train_mode
from mmvit.train.start.freeze import freeze


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
        ('train.freeze=["*.weight"]', "train.freeze"),
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


@pytest.mark.parametrize("override", ["train.checkpointing=full", "train.micro_batches=2", "lora.rank=2"])
def test_frozen_layers_exclude_nothing_but_bfloat16_parameters(tmp_path: Path, override: str):
    (tmp_path / "config.yaml").write_text("{}")
    settings = ["data.train=shards", "model.image={kind: cvt}", "train.freeze=[image_*]"]

    def config(*more: str) -> PretrainConfig:
        return load_config(PretrainConfig, tmp_path / "config.yaml", [*settings, *more], complete=False)

    model = build(config())
    check_batch_norm(model, config(override))
    with pytest.raises(UsageError, match="has BatchNorm"):
        check_batch_norm(model, config("train.precision=bf16_params"))
    with pytest.raises(UsageError, match="has BatchNorm"):  # the first stage alone
        check_batch_norm(model, config(override, "train.freeze=[image_tower.stages.0.*]"))


def test_only_layers_that_are_frozen_as_a_whole_stay_in_evaluation_mode():
    layers = {"plain": nn.BatchNorm1d(3), "part": nn.BatchNorm1d(3), "bare": nn.BatchNorm1d(3, affine=False)}
    model = nn.ModuleDict({"frozen": nn.ModuleDict(layers), "trained": nn.BatchNorm1d(3), "dropout": nn.Dropout(0.5)})
    freeze(model, ["frozen.plain.*", "frozen.part.weight"])
    for _ in range(2):
        train_mode(model.eval())
        assert [module.training for module in layers.values()] == [False, True, True]
    freeze(model, ["frozen.*"])
    train_mode(model)
    assert [module.training for module in layers.values()] == [False, False, False]
    assert [model["trained"].training, model["dropout"].training, model["frozen"].training] == [True, True, True]


def test_an_evaluation_between_steps_leaves_frozen_layers_in_evaluation_mode():
    model = nn.ModuleDict({"frozen": nn.BatchNorm1d(3), "trained": nn.BatchNorm1d(3)})
    freeze(model, ["frozen.*"])
    settings, one_device = SimpleNamespace(lora=SimpleNamespace(rank=0)), SimpleNamespace(is_fsdp2=False)
    run = SimpleNamespace(model=model, ema=None, config=settings, accelerator=one_device)
    with Run.finished_model(run) as finished:  # type: ignore[arg-type]
        assert [module.training for module in finished.values()] == [False, False]
    assert [module.training for module in model.values()] == [False, True]


def test_statistics_of_a_frozen_tower_are_the_same_bits_after_a_run(tiny_config: Path, tmp_path: Path):
    """With micro-batches, which run the tower twice, and EMA weights."""
    tower = "{kind: resnet, image_size: 32, width: 32, depths: [1, 1], stem_width: 8, num_heads: 2}"
    config = tmp_path / "config.yaml"
    config.write_text(re.sub(r"image: \{.*?\}", f"image: {tower}", tiny_config.read_text(), flags=re.DOTALL))
    settings = ["train.steps=2", "train.batch_size=8", "train.micro_batches=2", "optim.ema_decay=0.9"]
    settings += [f"out={tmp_path / 'run'}", "data.num_workers=0", "train.freeze=[image_tower.*]"]
    weights = load_file(pretrain(load_config(PretrainConfig, config, settings)) / "model.safetensors")
    means, variances = (
        [tensor for name, tensor in weights.items() if name.endswith(end)] for end in ("running_mean", "running_var")
    )
    assert len(means) == len(variances) > 5
    assert all(torch.equal(mean, torch.zeros_like(mean)) for mean in means)
    assert all(torch.equal(variance, torch.ones_like(variance)) for variance in variances)
    assert not any(tensor.any() for name, tensor in weights.items() if name.endswith("num_batches_tracked"))


def test_batch_norm_needs_two_images_of_a_micro_batch():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    check_share(model, 2)
    with pytest.raises(UsageError, match=r"BatchNorm \(1\), and each rank has a single image") as error:
        check_share(model, 1)
    assert error.value.where == "train.batch_size"
    model[1].requires_grad_(False)
    check_share(model, 1)
    check_share(torch.nn.LayerNorm(3), 1)
