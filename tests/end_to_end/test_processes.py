"""Two processes follow one: same global batches, same losses, nothing read twice or left out."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import Process, launch, launcher, start

from data_tools.tar.expand import expand_shards
from mmvit.config import PretrainConfig, load_config
from mmvit.data.batches import BatchSplit, TrainBatches
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import build_tokenizer
from mmvit.train.loop import pretrain as run_to_end
from mmvit.train.record.run_log import read_log

STEPS = 20
BATCH_SIZE = 24
SETTINGS = (f"train.steps={STEPS}", f"train.batch_size={BATCH_SIZE}", "train.log_every=1", "train.save_every=4")
TOLERANCE = 1e-5  # relative, in fp32: sums over the batch are added up in another order
BF16_TOLERANCE = 0.004  # relative, of a loss in bf16: its unit in the last place
LIMIT_S = 180
DDP = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
use_cpu: false
"""
FSDP2 = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")


def pretrain(
    config: Path, out: Path, launch: Sequence[str] = (sys.executable,), *settings: str, bf16: bool = False
) -> Process:
    """Start a run in a process group of its own.

    `accelerate launch --cpu` starts a single process, whatever number it is given; two on processors need --multi_gpu.
    """
    command = [*launch, "-m", "mmvit", "pretrain", str(config), f"out={out}", *SETTINGS, *settings]
    units = "1" if bf16 else "0"  # the same arithmetic on every machine
    return start(command, out.parent / "output.txt", ACCELERATE_USE_CPU="true", MMVIT_BF16_UNITS=units)


def finish(process: Process, out: Path) -> Path:
    assert process.wait(LIMIT_S) == 0, (out.parent / "output.txt").read_text()
    return out


def wait_for_step(step: int, process: Process, out: Path) -> None:
    limit = time.monotonic() + LIMIT_S
    while len(read_log(out / "log.jsonl")) < step:
        assert process.poll() is None, (out.parent / "output.txt").read_text()
        assert time.monotonic() < limit
        time.sleep(0.001)


def assert_same_course(one: Path, other: Path) -> None:
    """Each step was taken once, on the same samples and with the same loss."""
    lines, others = (read_log(folder / "log.jsonl") for folder in (one, other))
    assert [line["step"] for line in lines] == [line["step"] for line in others] == list(range(1, STEPS + 1))
    worst = {
        name: max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(lines, others, strict=True))
        for name in ("loss", "grad_norm", "logit_scale")
    }
    print("largest relative differences:", worst)
    assert (one / "bad_samples.jsonl").read_bytes() == (other / "bad_samples.jsonl").read_bytes() != b""
    assert worst["loss"] <= TOLERANCE
    assert worst["logit_scale"] <= TOLERANCE
    assert worst["grad_norm"] <= 10 * TOLERANCE  # a gradient that is halved or doubled would be off by 0.5 and more


@pytest.fixture(scope="module")
def spoiled_config(
    tiny_config: Path,
    tiny_data: Path,
    spoiled_data: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny config with data of which every fifth sample is bad."""
    folder = tmp_path_factory.mktemp("spoiled")
    data = spoiled_data(folder / "data", broken=range(0, 300, 5))
    path = folder / "spoiled.yaml"
    setting = f'train: ["{tiny_data}/train-*.tar"]'
    path.write_text(tiny_config.read_text().replace(setting, f'train: ["{data}"]\n  max_bad_fraction: 0.5'))
    return path


@pytest.fixture(scope="module")
def one_process(spoiled_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    return finish(pretrain(spoiled_config, out), out)


@pytest.fixture(scope="module")
def two_processes(spoiled_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    launch_config = out.with_name("ddp.yaml")
    launch_config.write_text(DDP)
    return finish(pretrain(spoiled_config, out, launcher(None, "--config_file", str(launch_config))), out)


def test_two_processes_follow_one(one_process: Path, two_processes: Path):
    assert "steps of 24 over 2 ranks" in (two_processes.parent / "output.txt").read_text()
    assert "steps of 24, " in (one_process.parent / "output.txt").read_text()
    assert_same_course(one_process, two_processes)


@pytest.mark.usefixtures("bf16_units")
def test_two_processes_follow_one_in_bf16(tiny_config: Path, tmp_path: Path):
    """Gradients of half a batch are rounded to bf16 each, so that the runs part after the first step."""
    settings = ("train.steps=4", "train.batch_size=8", "train.log_every=1", "train.precision=auto")
    command = ["-m", "mmvit", "pretrain", str(tiny_config), f"out={tmp_path / 'two'}", *settings]
    ranks = launch(2, command, lambda rank: tmp_path / "output.txt")
    one = read_log(
        run_to_end(load_config(PretrainConfig, tiny_config, [f"out={tmp_path / 'one'}", *settings])).parent
        / "log.jsonl"
    )
    assert [rank.wait(LIMIT_S) for rank in ranks] == [0, 0], (tmp_path / "output.txt").read_text()
    two = read_log(tmp_path / "two" / "log.jsonl")
    worst = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two, strict=True)]
    print("relative differences:", worst)
    assert max(worst) <= BF16_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_drop_path_is_the_same_for_every_split(tiny_config: Path, tmp_path: Path, kind: str):
    """The weights after four steps by 1 and 2 ranks with 1, 2 and 4 micro-batches each."""
    tower = "{image_size: 32, patch_size: 8, width: 32, depth: 3, num_heads: 2}"
    if kind == "swin":
        tower = (
            "{kind: swin, image_size: 32, patch_size: 4, window_size: 4, width: 8, depths: [1, 1], num_heads: [1, 1]}"
        )
    config = tmp_path / "config.yaml"
    config.write_text(re.sub(r"image: \{.*?\}", f"image: {tower}", tiny_config.read_text(), flags=re.DOTALL))
    settings = ("train.steps=4", "optim.name=sgd", "optim.lr=0.1", "optim.warmup_share=0")

    def weights(drop_path: float, num_ranks: int = 1, micro_batches: int = 1) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{drop_path}-{num_ranks}-{micro_batches}" / "run"
        how = [sys.executable] if num_ranks == 1 else launcher(num_ranks, "--multi_gpu")
        own = (f"model.image.drop_path={drop_path}", f"train.micro_batches={micro_batches}")
        return load_file(finish(pretrain(config, out, how, *settings, *own), out) / "model" / "model.safetensors")

    def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return max((one[name] - other[name]).abs().max().item() for name in one)

    whole = weights(0.6)
    found = {split: distance(whole, weights(0.6, *split)) for split in ((1, 2), (1, 4), (2, 1), (2, 2))}
    print("largest differences:", found)
    assert max(found.values()) <= 3e-6
    assert distance(whole, weights(0.0)) > 1e-3


@pytest.mark.parametrize(
    ("before", "after", "launched"),
    [
        (2, 1, False),
        pytest.param(2, 1, True, marks=pytest.mark.slow),
        pytest.param(1, 2, True, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_goes_on_with_another_number_of_processes(
    one_process: Path, spoiled_config: Path, tmp_path: Path, before: int, after: int, launched: bool
):
    """Of two that are launched the launcher is stopped; it has an exit code of its own."""
    run, how = tmp_path / "run", {1: [sys.executable], 2: launcher(2, "--multi_gpu")}
    if launched:
        processes = [pretrain(spoiled_config, run, how[before])]
    else:
        program = ["-m", "mmvit", "pretrain", str(spoiled_config), f"out={run}", *SETTINGS]
        units = {"MMVIT_BF16_UNITS": "0"}
        processes = launch(before, program, lambda rank: tmp_path / "output.txt", units)
    wait_for_step(7, processes[0], run)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    expected = 1 if launched and before == 2 else 143
    assert {process.wait(30) for process in processes} == {expected}
    stopped_at = len(read_log(run / "log.jsonl"))
    assert 7 <= stopped_at < STEPS
    assert max(path.name for path in (run / "checkpoints").glob("step-*")) == f"step-{stopped_at:08d}"
    assert f"stopped at step {stopped_at} with the state saved" in (tmp_path / "output.txt").read_text()
    finish(pretrain(spoiled_config, run, how[after]), run)
    assert f"resuming at step {stopped_at}" in (tmp_path / "output.txt").read_text()
    assert_same_course(one_process, run)


@pytest.mark.slow
def test_sharding_on_processors_is_told_and_trains_without(two_processes: Path, spoiled_config: Path, tmp_path: Path):
    finish(pretrain(spoiled_config, tmp_path / "run", launcher(2, *FSDP2)), tmp_path / "run")
    output = (tmp_path / "output.txt").read_text()
    assert "accelerate shards only on accelerators" in output
    assert "steps of 24 over 2 ranks" in output
    assert_same_course(two_processes, tmp_path / "run")


def batches(config: PretrainConfig, rank: int, world_size: int) -> TrainBatches:
    return TrainBatches(
        IndexedShards(expand_shards(config.data.train)),
        config.data,
        build_tokenizer(config.tokenizer, config.model.text.context_length),
        image_size=config.model.image.image_size,
        batch_size=BATCH_SIZE,
        num_steps=config.train.steps,
        seed=config.seed,
        split=BatchSplit(rank, world_size),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_sample_of_an_epoch_is_used_once(tiny_config: Path, world_size: int):
    """The real runs above read exactly these batches: a batch is a function of configuration, rank and step alone."""
    config = load_config(PretrainConfig, tiny_config)
    ranks = [batches(config, rank, world_size) for rank in range(world_size)]
    whole = batches(config, 0, 1)
    num_samples, num_epochs = len(whole.source), 2
    steps = range(-(-num_epochs * num_samples // BATCH_SIZE))
    used = []
    for step in steps:
        parts = [rank[step].keys for rank in ranks]
        assert {len(part) for part in parts} == {BATCH_SIZE // world_size}
        used += [key for part in parts for key in part]
        if world_size > 1:
            assert used[-BATCH_SIZE:] == whole[step].keys  # the same global batch in the same order
    keys = [whole.source.key(i) for i in range(num_samples)]
    for epoch in range(num_epochs):
        assert Counter(used[epoch * num_samples : (epoch + 1) * num_samples]) == Counter(keys)
    assert used[:num_samples] != used[num_samples : 2 * num_samples]  # each epoch has an order of its own


@pytest.mark.slow
def test_lone_process_is_told(tiny_config: Path, tmp_path: Path):
    command = [
        *launcher(2, "--cpu"),
        "-m",
        "mmvit",
        "pretrain",
        str(tiny_config),
        f"out={tmp_path / 'run'}",
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert "this run has a single rank" in done.stderr


@pytest.mark.slow
def test_two_killed_processes_end_with_the_same_bytes(two_processes: Path, spoiled_config: Path, tmp_path: Path):
    run = tmp_path / "run"
    for target in (2, 9):
        process = pretrain(spoiled_config, run, launcher(2, "--multi_gpu"))
        wait_for_step(target, process, run)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT_S)
    finish(pretrain(spoiled_config, run, launcher(2, "--multi_gpu")), run)
    for name in ("model/model.safetensors", f"checkpoints/step-{STEPS:08d}/optimizer.safetensors"):
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (run, two_processes)]
        assert digests[0] == digests[1], name
    assert [line["step"] for line in read_log(run / "log.jsonl")] == list(range(1, STEPS + 1))
