"""One process of several layouts: python layout_rank.py CONFIG RANK WORLD_SIZE OUT; not a test itself.

Loads its parts of some steps with each number of workers and micro-batches, and writes to OUT, as JSON,
{"WORKERS MICRO": {step: [digest of each sample]}}. The digest is of all that a sample has.
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path

from data_tools.tar.expand import expand_shards
from mmvit.config import PretrainConfig, load_config
from mmvit.data.batches import Batch, BatchSplit, TrainBatches
from mmvit.data.loader import Loader
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import build_tokenizer
from mmvit.layers.patch_embedding import Patches

STEPS = (0, 1, 2, 12, 13, 1000)  # 12.5 steps are an epoch


def digests(batch: Batch, pad: int) -> list[str]:
    images = batch.images if isinstance(batch.images, Patches) else [batch.images]
    columns = (batch.keys, batch.positions.tolist(), batch.groups.tolist(), batch.ids, *images)
    contents = [
        [
            *(key, position, groups),
            [text[text != pad].tolist() for text in ids],
            [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in image],
        ]
        for key, position, groups, ids, *image in zip(*columns, strict=True)
    ]
    return [hashlib.sha256(json.dumps(content).encode()).hexdigest() for content in contents]


def main(config_path: str, rank: int, world_size: int, out: str) -> None:
    config = load_config(PretrainConfig, config_path)
    shards = IndexedShards(expand_shards(config.data.train))
    tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
    found: dict[str, dict[int, list[str]]] = {}
    for num_workers in range(4):
        for micro_batches in (1, 2):
            config.data.num_workers = num_workers
            batches = TrainBatches(
                shards,
                config.data,
                tokenizer,
                image_size=config.model.image.image_size,
                batch_size=config.train.batch_size,
                num_steps=config.train.steps,
                seed=config.seed,
                split=BatchSplit(rank, world_size, micro_batches),
                stages=config.curriculum,
                patch_size=config.model.image.patch_size,
            )
            numbers = [step * micro_batches + micro for step in STEPS for micro in range(micro_batches)]
            parts = found[f"{num_workers} {micro_batches}"] = {}
            with Loader(batches, numbers) as loader:
                for number, batch in zip(numbers, loader, strict=True):
                    assert isinstance(batch, Batch), batch
                    parts.setdefault(number // micro_batches, []).extend(digests(batch, tokenizer.pad))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than processors
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
