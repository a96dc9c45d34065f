"""A run restores everything in a checkpoint: unknown or missing state is an error and never ignored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmvit.checkpoint.sealed as sealed

STORED = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "version1"

RunCli = Callable[..., tuple[int, str, str]]
Leaves = dict[str, Tensor]


def change(name: str, how: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change one file of a checkpoint, or remove it if `how` returns None, and rewrite the manifest."""

    def changed(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".json":
            path.write_text(json.dumps(how(json.loads(path.read_text()))))
        else:
            leaves = load_file(path) if path.exists() else {}
            left = how({key: value.clone() for key, value in leaves.items()})
            path.unlink(missing_ok=True)
            if left is not None:
                save_file(left, path)
        (folder / "manifest.json").unlink()
        tree = {"format_version": 1, "step": 4, "files": sealed.digests_of(folder)}
        sealed.write_sealed(folder / "manifest.json", tree)

    return changed


def renamed(old: str, new: str) -> Callable[[Leaves], Leaves]:
    return lambda leaves: {new if key == old else key: value for key, value in leaves.items()}


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a group more": (change("average.safetensors", lambda _: {"a": torch.ones(2)}), "average"),
    "a group less": (change("optimizer.safetensors", lambda _: None), "lacks optimizer"),
    "an entry of the state more": (change("state.json", lambda state: state | {"sampler": 7}), "sampler"),
    "a weight more": (change("model.safetensors", lambda leaves: leaves | {"new": torch.ones(2)}), "new"),
    "a weight less": (
        change("model.safetensors", lambda leaves: {k: v for k, v in leaves.items() if k != "logit_scale"}),
        "logit_scale",
    ),
    "a parameter more": (change("optimizer.safetensors", renamed("1.0.exp_avg", "1.99.exp_avg")), "1.99.exp_avg"),
    "an optimiser more": (change("optimizer.safetensors", renamed("1.0.exp_avg", "2.0.exp_avg")), "2.0.exp_avg"),
}


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_with_other_leaves_is_refused(
    name: str, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(shutil.copytree(STORED, tmp_path / "copy"))
    folder = Path("run/checkpoints/step-00000004")
    damage, message = CASES[name]
    damage(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = run_cli("pretrain", "run/config.yaml")
    assert code == 4, err
    assert message in err
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not Path("run/model").exists()


def test_a_tensor_of_two_names_is_written_for_both(tmp_path: Path):
    """As those of models whose modules share a weight."""
    shared = torch.arange(6.0)
    sealed.write_tensors({"a": shared, "b": shared, "c": shared[2:4]}, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [0, 1, 2, 3, 4, 5],
        "c": [2, 3],
    }
