"""Two processes follow one: same global batches, same losses, nothing read twice or left out."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.expand import expand_shards
from mmvit.config import PretrainConfig, load_config
from mmvit.data.batches import TrainBatches
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import build_tokenizer
from mmvit.train.log import read_log

STEPS = 20
BATCH_SIZE = 24
SETTINGS = (f"train.steps={STEPS}", f"train.batch_size={BATCH_SIZE}", "train.log_every=1", "train.save_every=4")
TOLERANCE = 1e-4  # relative, in fp32: sums over the batch are added up in another order
LIMIT_S = 180


def launched(*how: str) -> list[str]:
    """A command of `accelerate launch` for two processes on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *how, *told, "--main_process_port", port]


def pretrain(config: Path, out: Path, environment: dict[str, str], num_processes: int) -> "subprocess.Popen[str]":
    """Start a run in a process group of its own.

    `accelerate launch --cpu` starts a single process, whatever number it is given; two on processors need --multi_gpu.
    """
    launch = launched("--multi_gpu") if num_processes == 2 else [sys.executable]
    command = [*launch, "-m", "mmvit", "pretrain", str(config), f"out={out}", *SETTINGS]
    environment = environment | {"ACCELERATE_USE_CPU": "true"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, text=True, env=environment, start_new_session=True
        )


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
    told = f'train: ["{tiny_data}/train-*.tar"]'
    path.write_text(tiny_config.read_text().replace(told, f'train: ["{data}"]\n  max_bad_fraction: 0.5'))
    return path


@pytest.fixture(scope="module")
def two_processes(spoiled_config: Path, one_thread: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    process = pretrain(spoiled_config, out, one_thread, num_processes=2)
    assert process.wait(LIMIT_S) == 0, (out.parent / "output.txt").read_text()
    return out


def test_two_processes_follow_one(
    two_processes: Path, spoiled_config: Path, one_thread: dict[str, str], tmp_path: Path
):
    process = pretrain(spoiled_config, tmp_path / "run", one_thread, num_processes=1)
    assert process.wait(LIMIT_S) == 0, (tmp_path / "output.txt").read_text()
    assert "steps of 24 over 2 processes" in (two_processes.parent / "output.txt").read_text()
    assert "steps of 24, " in (tmp_path / "output.txt").read_text()
    one, two = (read_log(folder / "log.jsonl") for folder in (tmp_path / "run", two_processes))
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, STEPS + 1))
    worst = {
        name: max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(one, two, strict=True))
        for name in ("loss", "grad_norm", "logit_scale")
    }
    print("largest relative differences:", worst)
    bad = [(folder / "bad_samples.jsonl").read_bytes() for folder in (tmp_path / "run", two_processes)]
    assert bad[0] == bad[1] != b""
    assert worst["loss"] <= TOLERANCE
    assert worst["grad_norm"] <= 10 * TOLERANCE  # a gradient that is halved or doubled would be off by 0.5 and more


def batches(config: PretrainConfig, rank: int, world_size: int) -> TrainBatches:
    return TrainBatches(
        IndexedShards(expand_shards(config.data.train)),
        config.data,
        build_tokenizer(config.tokenizer, config.model.text.context_length),
        image_size=config.model.image.image_size,
        batch_size=BATCH_SIZE,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_sample_of_an_epoch_is_used_once(tiny_config: Path, world_size: int):
    """The real runs above read exactly these batches: a batch is a function of configuration, rank and step alone."""
    config = load_config(PretrainConfig, tiny_config)
    ranks = [batches(config, rank, world_size) for rank in range(world_size)]
    whole = batches(config, 0, 1)
    num_samples, num_epochs = len(whole.shards), 2
    steps = range(-(-num_epochs * num_samples // BATCH_SIZE))
    used = []
    for step in steps:
        parts = [rank[step].keys for rank in ranks]
        assert {len(part) for part in parts} == {BATCH_SIZE // world_size}
        used += [key for part in parts for key in part]
        if world_size > 1:
            assert used[-BATCH_SIZE:] == whole[step].keys  # the same global batch in the same order
    keys = [whole.shards.key(i) for i in range(num_samples)]
    for epoch in range(num_epochs):
        assert Counter(used[epoch * num_samples : (epoch + 1) * num_samples]) == Counter(keys)
    assert used[:num_samples] != used[num_samples : 2 * num_samples]  # each epoch has an order of its own


def test_lone_process_is_told(tiny_config: Path, one_thread: dict[str, str], tmp_path: Path):
    command = [*launched("--cpu"), "-m", "mmvit", "pretrain", str(tiny_config), f"out={tmp_path / 'run'}", "--dry-run"]
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert "this run has one process" in done.stderr


@pytest.mark.slow
def test_two_killed_processes_end_with_the_same_bytes(
    two_processes: Path, spoiled_config: Path, one_thread: dict[str, str], tmp_path: Path
):
    run = tmp_path / "run"
    for target in (2, 9):
        process = pretrain(spoiled_config, run, one_thread, num_processes=2)
        limit = time.monotonic() + LIMIT_S
        while len(read_log(run / "log.jsonl")) < target:
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            assert time.monotonic() < limit
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT_S)
    assert pretrain(spoiled_config, run, one_thread, num_processes=2).wait(LIMIT_S) == 0
    for name in ("model/model.safetensors", f"checkpoints/step-{STEPS:08d}/optimizer.safetensors"):
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (run, two_processes)]
        assert digests[0] == digests[1], name
    assert [line["step"] for line in read_log(run / "log.jsonl")] == list(range(1, STEPS + 1))
