"""Two GPUs follow one: DDP and FSDP2 through `accelerate launch`, with NCCL."""

import subprocess
from pathlib import Path

import pytest
import torch
from support.processes import launcher

from mmvit.train.record.run_log import read_log

STEPS, LIMIT_S = 20, 300
SETTINGS = (f"train.steps={STEPS}", "train.batch_size=24", "train.log_every=1", "optim.name=adamw")
KINDS = {
    "ddp": ("--multi_gpu",),
    "fsdp2": ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
}
TOLERANCE = 1e-4  # relative; kernels add up in another order


def pretrain(config: Path, out: Path, num_processes: int, *how: str) -> list[float]:
    command = [*launcher(num_processes, *how), "-m", "mmvit", "pretrain", str(config), f"out={out}", *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in read_log(out / "log.jsonl")]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_follow_one(tiny_config: Path, tmp_path: Path, kind: str):
    one = pretrain(tiny_config, tmp_path / "one", 1)
    two = pretrain(tiny_config, tmp_path / "two", 2, *KINDS[kind])
    assert len(one) == len(two) == STEPS
    assert two == pytest.approx(one, rel=TOLERANCE)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()
