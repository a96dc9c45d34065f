"""Memory of a loader process: python worker_memory.py SHARDS DECODE, on Linux; not a test itself.

Prints as JSON, in MiB: the resident memory of an interpreter with torch alone, the peak of the loader process's, and
the peak of what only the loader process uses.
"""

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

BATCH_SIZE, IMAGE_SIZE, NUM_BATCHES = 256, 224, 4


def memory(pid: int | str) -> tuple[float, float]:
    """Resident, and private to the process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def main(folder: str, decode: str) -> None:
    from data_tools.tar.expand import expand_shards
    from mmvit.data.batches import Batch, DataConfig, TrainBatches
    from mmvit.data.loader import Loader
    from mmvit.data.shards import IndexedShards
    from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer

    config = DataConfig(decode=decode, num_workers=1)
    shards, tokenizer = IndexedShards(expand_shards(folder), verify=True), build_tokenizer(TokenizerConfig(), 77)
    batches = TrainBatches(
        shards, config, tokenizer, image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, num_steps=NUM_BATCHES, seed=0
    )
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for child in multiprocessing.active_children():
                seen.append(memory(child.pid))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    with Loader(batches, range(NUM_BATCHES)) as loader:
        stream = iter(loader)
        assert isinstance(next(stream), Batch)
        watcher.start()
        assert all(isinstance(batch, Batch) for batch in stream)
        done.set()
        watcher.join()
    program = "import torch; print(open('/proc/self/smaps_rollup').readlines()[1].split()[1])"  # Rss
    alone = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout) / 1024
    resident, private = (max(column) for column in zip(*seen, strict=True))
    print(json.dumps({"torch alone": alone, "resident": resident, "private": private}))


if __name__ == "__main__":
    main(*sys.argv[1:])
