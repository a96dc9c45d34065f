"""The global batches are the same however many processes, workers and micro-batches share in them.

A smaller version, within one process, is in tests/data/test_batches.py.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WORLD_SIZES, NUM_WORKERS, MICRO_BATCHES = (1, 2, 4), (0, 1, 2, 3), (1, 2)
BATCH_SIZE = 24
LIMIT_S = 300


def load_all(config: Path, folder: Path) -> dict[tuple[int, int, int], str]:
    """Return the SHA-256 of some global batches for each layout, from a real process for each rank, two at a time."""
    ranks = [(rank, world_size) for world_size in WORLD_SIZES for rank in range(world_size)]
    outputs = {place: folder / f"{place[0]}-of-{place[1]}.json" for place in ranks}
    program = Path(__file__).with_name("layout_rank.py")
    for start in range(0, len(ranks), 2):
        running = [
            subprocess.Popen([sys.executable, str(program), str(config), *map(str, place), str(outputs[place])])
            for place in ranks[start : start + 2]
        ]
        assert [process.wait(LIMIT_S) for process in running] == [0] * len(running)
    found = {place: json.loads(path.read_text()) for place, path in outputs.items()}
    hashes = {}
    for world_size in WORLD_SIZES:
        for layout in found[0, world_size]:
            parts = [found[rank, world_size][layout] for rank in range(world_size)]
            batches = {step: [digest for part in parts for digest in part[step]] for step in parts[0]}
            assert {len(batch) for batch in batches.values()} == {BATCH_SIZE}
            num_workers, micro_batches = map(int, layout.split())
            digest = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
            hashes[world_size, num_workers, micro_batches] = digest
    return hashes


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["one data set in stages", "two data sets in patches"])
def test_24_layouts_have_the_same_batches(
    tiny_config: Path,
    tiny_data: Path,
    spoiled_data: Callable[..., Path],
    tmp_path: Path,
    mixed: bool,
):
    """Order and contents, some samples being bad; steps 0, 1 and 12 are in different stages."""
    data = spoiled_data(tmp_path / "data", broken=range(0, 300, 7), max_samples=30)
    sets = [f'"{data}/train-0000[0-4].tar"', f'"{data}/train-0000[5-9].tar"'] if mixed else [f'"{data}"']
    weights = "\n  weights: [1.0, 2.5]\n  patch_budget: 20" if mixed else ""
    stages = "{until: 0.05, image_size: 16}, {until: 0.52, text_tokens: 5}, {until: 1.0, patch_dropout: 0.5}"
    curriculum = "" if mixed else f"curriculum: [{stages}]\n"
    setting = f'train: ["{tiny_data}/train-*.tar"]'
    text = (
        tiny_config.read_text()
        .replace("steps: 20", "steps: 24")
        .replace(setting, f"train: [{', '.join(sets)}]{weights}")
    )
    assert setting not in text
    if mixed:  # a budget of patches needs a tower without a convolutional stem
        text = text.replace("stem_channels: [16, 16, 32]", "stem_channels: []")
    config = tmp_path / "config.yaml"
    config.write_text(curriculum + text.replace("batch_size: 32", f"batch_size: {BATCH_SIZE}"))
    hashes = load_all(config, tmp_path)
    assert len(hashes) == 24
    assert len(set(hashes.values())) == 1, hashes
