"""DDP and FSDP2 with two real processes against one: the losses, and checkpoints that each reads from each."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from support.processes import launch
from torch import nn

from mmvit.train.device.parallel import full_state, make_shardable, shard_state, syncing, whole

PROGRAM = Path(__file__).with_name("parallel_rank.py")
LIMIT_S = 300
SLOW = pytest.mark.slow
TOLERANCE = 1e-5
KINDS = {"one": 1, "ddp": 2, "fsdp": 2}  # number of processes

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train, or only read and write again what was trained, and return the folder; each is done once."""
    folder, done = tmp_path_factory.mktemp("parallel"), dict[tuple[Any, ...], Path]()

    def run(kind: str, num_parts: int = 1, start: Path | None = None, optimizer: str = "adamw") -> Path:
        key = (kind, num_parts, start, optimizer)
        if key not in done:
            out = folder / str(len(done))
            environment = {"OPTIMIZER": optimizer, "ACCELERATE_USE_CPU": "true"}
            if KINDS[kind] == 1:
                with pytest.MonkeyPatch.context() as patch:
                    for name, value in environment.items():
                        patch.setenv(name, value)
                    runpy.run_path(str(PROGRAM))["main"](kind, num_parts, out, str(start or ""))
            else:
                program = [str(PROGRAM), kind, str(num_parts), str(out), *([str(start)] if start else [])]
                ranks = launch(KINDS[kind], program, environment=environment)
                assert [rank.wait(LIMIT_S) for rank in ranks] == [0, 0]
            done[key] = out
        return done[key]

    return run


def steps(folder: Path) -> list[list[float]]:
    return json.loads((folder / "steps.json").read_text())["steps"]


@pytest.mark.parametrize(
    ("kind", "num_parts"),
    [
        pytest.param("ddp", 1, marks=SLOW),
        pytest.param("fsdp", 1, marks=SLOW),
        pytest.param("ddp", 2, marks=SLOW),
        ("fsdp", 2),
    ],
)
def test_losses_and_gradients_are_those_of_one_process(train: Train, kind: str, num_parts: int):
    one, two = steps(train("one")), steps(train(kind, num_parts))
    worst = max(
        abs(a - b) / a for first, second in zip(one, two, strict=True) for a, b in zip(first, second, strict=True)
    )
    print(f"{kind}, {num_parts} parts: largest relative difference over {len(one)} steps {worst:.1e}")
    assert len(one) == 20
    assert one[-1][0] < one[0][0]
    assert worst <= TOLERANCE


@pytest.mark.slow
def test_only_fsdp_cuts_parameters(train: Train):
    cut = {kind: json.loads((train(kind) / "steps.json").read_text())["cut"] for kind in KINDS}
    assert cut["one"] == cut["ddp"] == 0
    assert cut["fsdp"] == len(load_file(train("fsdp") / "model.safetensors"))


@pytest.mark.parametrize(("writer", "reader"), [("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "one"), ("one", "fsdp")])
@pytest.mark.slow
def test_checkpoint_of_each_is_read_by_each(train: Train, writer: str, reader: str):
    """Read and written again it has the same bytes, in all tensors, names and shapes."""
    written = train(writer)
    again = train(reader, start=written)
    for name in ("model", "optimizer"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (written, again))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.shape == after[key].shape, key
            assert tensor.dtype == after[key].dtype, key
            assert torch.equal(tensor, after[key]), key
    assert before  # the optimiser has a state


def test_one_process_goes_on_from_fsdp(train: Train):
    """All parameters were cut, and on disk nothing shows it: the scalar has no dimension either."""
    written = train("fsdp", 2)
    model = load_file(written / "model.safetensors")
    assert json.loads((written / "steps.json").read_text())["cut"] == len(model)
    assert model["logit_scale"].shape == ()
    again = load_file(train("one", start=written) / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.items())


def test_lone_process_is_left_alone():
    model = nn.Linear(2, 1, bias=False)
    model.scale = nn.Parameter(torch.tensor(1.0))
    make_shardable(Accelerator(cpu=True), model)
    assert model.scale.shape == ()
    tensors = model.state_dict()
    assert all(full_state(tensors)[name] is tensors[name] for name in tensors)
    assert all(shard_state(tensors, tensors)[name] is tensors[name] for name in tensors)
    assert whole(model.scale) is model.scale
    with syncing(model, on=False):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
