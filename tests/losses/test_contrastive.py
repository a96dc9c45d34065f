"""The contrastive loss is the formula, in one process and over several, with its gradients."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmvit.losses.contrastive import contrastive_loss

TOLERANCE = 1e-6
NUM_ROWS = 16
SCALE = 14.3


def unit_rows(seed: int, rows: int = NUM_ROWS) -> Tensor:
    return F.normalize(torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed)), dim=1)


def some_groups() -> Tensor:
    """Groups of 1 to 4 rows, scattered over the batch and over the shares of four processes."""
    return torch.tensor([5, 1, 2, 5, 3, 2, 9, 5, 7, 3, 8, 2, 5, 6, 4, 0])


def with_gradients(loss_function, image: Tensor, text: Tensor, scale: float, *rest) -> dict[str, Tensor]:
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves.append(torch.tensor(scale, dtype=image.dtype, requires_grad=True))
    loss = loss_function(*leaves, *rest)
    loss.backward()
    return dict(zip(("image", "text", "logit_scale"), (leaf.grad for leaf in leaves), strict=True)) | {
        "loss": loss.detach()
    }


def naive_loss(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """The definition, term by term: the mean of -log softmax over each row's positives, both ways."""
    logits = scale * image @ text.T
    groups = torch.arange(len(image)) if groups is None else groups
    terms = []
    for scores in (logits, logits.T):
        for i in range(len(scores)):
            positives = [j for j in range(len(scores)) if groups[j] == groups[i]]
            log_sum = scores[i].exp().sum().log()
            terms.append(sum(log_sum - scores[i, j] for j in positives) / len(positives))
    return sum(terms) / len(terms)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("groups", [None, some_groups()], ids=["plain", "groups"])
@pytest.mark.parametrize("scale", [1.0, SCALE, 100.0])
def test_equals_the_formula_in_float64_with_its_gradients(scale: float, groups: Tensor | None):
    image, text = unit_rows(0), unit_rows(1)
    expected = with_gradients(naive_loss, image.double(), text.double(), scale, groups)
    found = with_gradients(contrastive_loss, image, text, scale, groups)
    relative = {name: value / max(1.0, scale) for name, value in expected.items()}  # gradients grow with the scale
    assert worst({name: value / max(1.0, scale) for name, value in found.items()}, relative) <= TOLERANCE


def test_equals_open_clip():
    image, text = unit_rows(0), unit_rows(1)
    expected = with_gradients(ClipLoss(), image, text, SCALE)
    assert worst(with_gradients(contrastive_loss, image, text, SCALE), expected) <= TOLERANCE


def test_identical_rows_give_log_n():
    row = unit_rows(0, 1).expand(NUM_ROWS, -1)
    assert contrastive_loss(row, row, torch.tensor(SCALE)).item() == pytest.approx(math.log(NUM_ROWS), abs=TOLERANCE)


@pytest.mark.parametrize("groups", [None, some_groups()], ids=["plain", "groups"])
def test_towers_can_be_swapped(groups: Tensor | None):
    image, text, scale = unit_rows(0), unit_rows(1), torch.tensor(SCALE)
    assert contrastive_loss(image, text, scale, groups).item() == pytest.approx(
        contrastive_loss(text, image, scale, groups).item(), abs=TOLERANCE
    )


def test_groups_of_one_are_the_plain_loss():
    image, text, scale = unit_rows(0), unit_rows(1), torch.tensor(SCALE)
    plain = contrastive_loss(image, text, scale)
    single = contrastive_loss(image, text, scale, torch.randperm(NUM_ROWS))
    assert single.item() == pytest.approx(plain.item(), abs=TOLERANCE)


def test_logits_are_float32_under_autocast():
    image, text, scale = unit_rows(0), unit_rows(1), torch.tensor(100.0)
    expected = contrastive_loss(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert (image @ text.T).dtype == torch.bfloat16
        assert torch.equal(contrastive_loss(image, text, scale), expected)
        rounded = contrastive_loss(image.bfloat16(), text.bfloat16(), scale)
    assert rounded.dtype == torch.float32


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what four and two processes computed on shares of the same rows."""
    folder = tmp_path_factory.mktemp("gloo")
    rows = {"image": unit_rows(0), "text": unit_rows(1), "groups": some_groups(), "logit_scale": torch.tensor(SCALE)}
    save_file(rows, folder / "rows.safetensors")
    script = Path(__file__).with_name("gloo_rank.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.wait()
    return folder


def joined(folder: Path, world_size: int, case: str) -> dict[str, Tensor]:
    """What DDP makes of the processes' results: means over them, so that a row's own gradient counts 1 / W."""
    parts = [load_file(folder / f"{world_size}-{case}-{rank}.safetensors") for rank in range(world_size)]
    means = {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in ("loss", "logit_scale")}
    return means | {name: torch.cat([part[name] for part in parts]) / world_size for name in ("image", "text")}


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_equal_one(processes: Path, world_size: int):
    for case, groups in (("plain", None), ("groups", some_groups())):
        expected = with_gradients(contrastive_loss, unit_rows(0), unit_rows(1), SCALE, groups)
        assert worst(joined(processes, world_size, case), expected) <= TOLERANCE


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_gather_without_gradient_is_seen(processes: Path, world_size: int):
    expected = with_gradients(contrastive_loss, unit_rows(0), unit_rows(1), SCALE)
    found = joined(processes, world_size, "detached")
    assert abs(found["loss"] - expected["loss"]) <= TOLERANCE  # the values alone would not show it
    assert worst(found, expected) > 1000 * TOLERANCE
