"""What `--dry-run` says of a run, and what it refuses."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.core.errors import DataError, ResourceError, UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, load_config
from mmvit.train import rehearsal
from mmvit.train.contract import StepResult
from mmvit.train.loop import check
from mmvit.train.rehearsal import StepCost
from mmvit.train.run import Run
from mmvit.train.start.config import load_finetune_config

TINY_CLASSIFIER = """
model: {image: {image_size: 16, patch_size: 4, width: 32, depth: 1, num_heads: 2, pool: mean, pre_norm: false}}
data: {num_workers: 0, repeats: 3}
mix: {cutmix: 1.0}
optim: {ema_decay: 0.9}
"""


@pytest.fixture
def tiny(tiny_config: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """The tiny run in a folder of its own, with these overrides."""
    base = (f"out={tmp_path / 'run'}", "train.batch_size=24", "train.micro_batches=2")
    return lambda *overrides: load_config(PretrainConfig, tiny_config, [*base, *overrides])


def test_it_says_what_the_run_is_and_takes(tiny: Callable[..., PretrainConfig], tmp_path: Path):
    _, *lines = check(tiny()).splitlines()
    text = "\n".join(lines)
    assert "samples: 200 of 200 that were read are valid" in text
    shown = re.search(r"captions, as the model sees them:\n((?:  .*\n){3})", text)
    assert shown
    assert all(" | " in line for line in shown[1].splitlines())  # both captions of a sample
    assert re.search(r"time: about [\d,]+ samples/s, \d+ s for 20 steps", text)
    assert re.search(r"memory: about [\d.]+ [MG]iB a rank of [\d.]+ GiB", text)
    assert re.search(r"disk: up to 3 checkpoints of [\d.]+ MiB and a model of [\d.]+ MiB; [\d.]+ GiB free", text)
    assert not (tmp_path / "run").exists()


def test_a_classifier_with_all_options_is_rehearsed(labelled_images: Path, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(TINY_CLASSIFIER)
    overrides = [f"data.train={labelled_images}", f"out={tmp_path / 'run'}", "train.batch_size=12", "train.steps=5"]
    config = load_finetune_config(str(tmp_path / "tiny.yaml"), overrides)
    assert isinstance(config, FinetuneConfig)
    text = check(config)
    assert "for 5 steps" in text
    assert "captions" not in text


@pytest.fixture
def labelled_images(tiny_data: Path, tmp_path: Path) -> Path:
    from data_tools.tar.expand import expand_shards
    from mmvit.data.shards import IndexedShards

    shards = IndexedShards(expand_shards(f"{tiny_data}/train-*.tar"))
    for i in range(24):
        folder = tmp_path / "images" / ("even", "odd")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(shards.read(i).image)
    return tmp_path / "images"


def test_invalid_samples_beyond_the_limit_are_refused_and_few_are_reported(
    tiny: Callable[..., PretrainConfig],
    spoiled_data: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: Any,
    caplog: Any,
):
    monkeypatch.setattr(rehearsal, "NUM_SAMPLES", 300)
    data = spoiled_data(tmp_path / "data", broken=range(0, 300, 5))
    with pytest.raises(DataError, match=r"60 of 300 samples that were read are invalid, .* tolerates 1.0%"):
        check(tiny(f"data.train=[{data}]"))
    with caplog.at_level(logging.WARNING):
        text = check(tiny(f"data.train=[{data}]", "data.max_bad_fraction=0.3"))
    assert "60 of 300 samples that were read are invalid" in caplog.text
    assert "samples: 240 of 300 that were read are valid" in text


def test_of_a_larger_set_more_invalid_ones_are_chance(
    tiny: Callable[..., PretrainConfig], spoiled_data: Callable[..., Path], tmp_path: Path, monkeypatch: Any
):
    """Of 75 that are read two or three may be invalid where 1 % are tolerated, not twenty."""
    monkeypatch.setattr(rehearsal, "NUM_SAMPLES", 75)
    few = spoiled_data(tmp_path / "few", broken=range(8))
    valid = re.search(r"samples: (\d+) of 75 that were read are valid", check(tiny(f"data.train=[{few}]")))
    assert valid
    assert 71 <= int(valid[1]) < 75
    many = spoiled_data(tmp_path / "many", broken=range(0, 300, 4))
    with pytest.raises(DataError, match=r"(1\d|2\d) of 75"):
        check(tiny(f"data.train=[{many}]"))


def test_a_step_that_is_not_finite_is_refused(tiny: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Run, "step", lambda *args: StepResult({"softmax": float("nan")}, 1.0, None))
    with pytest.raises(UsageError, match=r"loss nan and gradient norm 1\.0 in the first step"):
        check(tiny())


def test_too_little_memory_is_refused(tiny: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)
    with pytest.raises(ResourceError, match=r"a step needs about .* a rank, and there are 3\.9 MiB") as caught:
        check(tiny())
    assert "train.micro_batches=4" in str(caught.value)


@pytest.mark.parametrize(
    ("workers", "read_s", "expected"),
    [
        (0, 0.5, "time: about 8 samples/s, 60 s for 20 steps"),  # 0.5 s of reading, 0.5 s of the step, for 8 samples
        (2, 0.5, "time: about 16 samples/s, 30 s for 20 steps"),
        (1, 2.0, "time: about 4 samples/s, 2.0 min for 20 steps; loading is slower than training: data.num_workers=2"),
    ],
)
def test_rate_of_reading_and_stepping(tiny: Callable[..., PretrainConfig], workers: int, read_s: float, expected: str):
    config = tiny(f"data.num_workers={workers}")
    assert rehearsal._rate(config, 1, StepCost(8, read_s, 0.5, 0), 20).removesuffix(" or more") == expected
