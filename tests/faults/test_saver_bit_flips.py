"""One bit of a checkpoint or a model folder changes on the disk: it is noticed, whichever it is."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saves import save, save_tiny_model

from data_tools.core.errors import CheckpointError
from mmvit.checkpoint import OtherVersionError, load_model, read_checkpoint

pytestmark = pytest.mark.usefixtures("quick_saves")


def unnoticed(folder: Path, read: Callable[[Path], Any], num_flips: int) -> tuple[list[tuple[str, int]], Counter[str]]:
    """Flip bits, one at a time and as often in each file; returns those that reading did not notice."""
    rng = random.Random(0)
    files = sorted(folder.iterdir())
    missed, noticed = [], Counter[str]()
    for i in range(num_flips):
        path = files[i % len(files)]
        data = path.read_bytes()
        bit = rng.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            read(folder)
            missed.append((path.name, bit))
        except OtherVersionError:
            missed.append((path.name, bit))  # damage is not another version
        except CheckpointError as error:
            noticed[path.name] += path.name in error.what
        path.write_bytes(data)
    read(folder)
    return missed, noticed


def test_bit_flips_in_a_checkpoint(tmp_path: Path):
    missed, noticed = unnoticed(save(tmp_path, 1), read_checkpoint, 600)
    print(dict(noticed))
    assert missed == []
    assert noticed.total() == 600
    assert noticed.keys() == {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}


def test_bit_flips_in_a_model_folder(tmp_path: Path):
    save_tiny_model(tmp_path, 1)
    missed, noticed = unnoticed(tmp_path / "model", load_model, 400)
    print(dict(noticed))
    assert missed == []
    assert noticed.total() == 400
    assert noticed.keys() == {"mmvit.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "mmvit.json"])
def test_every_bit_of_what_describes_the_folder(tmp_path: Path, name: str):
    if name == "manifest.json":
        folder, read = save(tmp_path, 1), read_checkpoint
    else:
        save_tiny_model(tmp_path, 1)
        folder, read = tmp_path / "model", load_model
    data = (folder / name).read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(changed)
        with pytest.raises(CheckpointError, match=name) as error:
            read(folder)
        assert not isinstance(error.value, OtherVersionError)
