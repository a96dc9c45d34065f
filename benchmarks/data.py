"""Measures the data path against webdataset and open_clip on the same shards, one thread, interleaved.

    python benchmarks/data.py                       all parts, photo-like shards made in a temporary folder
    python benchmarks/data.py decode --rounds 7     one part
    python benchmarks/data.py --scale 0.1           a tenth of the samples: a quick look, with noisier figures
    python benchmarks/data.py --out results.json    also write the figures

Each part runs A B A B ... and prints rates with the ratio of each pair: median, least, greatest. Files are in the page
cache: the work of a core is compared, not the disk.
"""

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from report import spread, write_report

from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from data_tools.make.tokenizer import train_tokenizer
from data_tools.tar.index import open_indexes
from data_tools.tar.writer import ShardWriter
from mmvit.data.batches import DataConfig, TrainBatches
from mmvit.data.shards import IndexedShards
from mmvit.data.stored import MANIFEST
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer

NUM_SHARDS = 4
Part = tuple[str, str, Callable[[], float], Callable[[], float]]  # name, unit, ours, theirs: each returns a rate
SIZES = {500: (500, 375), 1600: (1600, 1200)}


def main() -> None:
    """Run the parts that were asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the samples and shards to measure on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts or PARTS:
            for part in PARTS[name](Path(folder), options.scale):
                rows.append(measure(part, options.rounds))
                print(row_text(rows[-1]), flush=True)
    if options.out:
        write_report(options.out, {"rows": rows}, ["webdataset", "open_clip_torch"])


def measure(part: Part, rounds: int) -> dict[str, Any]:
    """Time both sides in turn, after one warm-up turn each."""
    name, unit, ours, theirs = part
    ours(), theirs()
    rates = [(ours(), theirs()) for _ in range(rounds)]
    our_rates, their_rates = zip(*rates, strict=True)
    medians = {"ours": statistics.median(our_rates), "theirs": statistics.median(their_rates)}
    return {"part": name, "unit": unit} | medians | {"ratio": spread(our_rates, their_rates)}


def row_text(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    rates = "{part:48} {ours:9.1f} against {theirs:9.1f} {unit}: ".format(**row)
    return rates + "{median:.2f}x ({least:.2f} to {greatest:.2f})".format(**row["ratio"])


def scaled(count: int, scale: float, multiple: int = 1) -> int:
    """Return the fraction `scale` of `count` as a multiple of `multiple`, at least one."""
    return max(1, round(count * scale / multiple)) * multiple


def decode(folder: Path, scale: float) -> Iterator[Part]:
    """Measure tar to training tensors: reading, decoding, crop, tokens, batch; ours verifies hashes, as by default."""
    import open_clip

    tokenizer = build_tokenizer(TokenizerConfig(), 77)
    preprocess = open_clip.image_transform(224, is_train=True)
    for width, size in SIZES.items():
        most, batch = (256, 32) if width == 500 else (48, 16)
        count = scaled(most, scale, batch)
        tars = shards_of(folder, size, count)
        batches = TrainBatches(
            IndexedShards(tars), DataConfig(), tokenizer, image_size=224, batch_size=batch, num_steps=1, seed=0
        )

        def ours(batches: TrainBatches = batches, count: int = count, batch: int = batch) -> float:
            start = time.perf_counter()
            for step in range(count // batch):
                batches[step]
            return count / (time.perf_counter() - start)

        def theirs(tars: list[str] = tars, count: int = count, batch: int = batch) -> float:
            pipeline = (
                wds.WebDataset(tars, shardshuffle=False)
                .shuffle(64, initial=16)
                .decode("pilrgb")
                .rename(image="jpg;png;jpeg;webp", text="txt")
                .map_dict(image=preprocess, text=lambda text: open_clip.tokenize(text)[0])
                .to_tuple("image", "text")
                .batched(batch, collation_fn=torch.utils.data.default_collate)
            )
            start = time.perf_counter()
            done = sum(len(images) for images, _ in pipeline)
            assert done == count
            return count / (time.perf_counter() - start)

        yield f"tar to training tensors, {width}-px JPEG", "images/s", ours, theirs


def read(folder: Path, scale: float) -> Iterator[Part]:
    """Measure reading the stored bytes of each sample, in the order of an epoch, without decoding."""
    for label, size, most in (("256-px JPEG", (256, 256), 4000), ("500-px JPEG", (500, 375), 2000)):
        count = scaled(most, scale, NUM_SHARDS)
        tars = with_metadata(shards_of(folder, size, count))
        shards = IndexedShards(tars)

        def ours(shards: IndexedShards = shards, count: int = count) -> float:
            start = time.perf_counter()
            for i in range(count):
                shards.fields(i)
            return count / (time.perf_counter() - start)

        def theirs(tars: list[str] = tars, count: int = count) -> float:
            start = time.perf_counter()
            assert sum(1 for _ in wds.WebDataset(tars, shardshuffle=False)) == count
            return count / (time.perf_counter() - start)

        yield f"reading without decoding, {label}", "samples/s", ours, theirs


def index(folder: Path, scale: float) -> Iterator[Part]:
    """Measure building the index of shards on all cores against SHA-256 of the same bytes in memory, one core."""
    tars = shards_of(folder, SIZES[1600], scaled(1200, scale, NUM_SHARDS))
    data = b"".join(Path(tar).read_bytes() for tar in tars)

    def ours() -> float:
        start = time.perf_counter()
        open_indexes([Path(tar) for tar in tars], rebuild=True)
        return len(data) / 1e6 / (time.perf_counter() - start)

    def theirs() -> float:
        start = time.perf_counter()
        hashlib.sha256(data).digest()
        return len(data) / 1e6 / (time.perf_counter() - start)

    yield "building indexes, against SHA-256 alone", "MB/s", ours, theirs


def start(folder: Path, scale: float) -> Iterator[Part]:
    """Measure opening 1,000 indexed shards and reading a batch of 256, against webdataset up to its first sample."""
    paths, num_shards = [], scaled(1000, scale)
    (folder / "many").mkdir()
    for i in range(num_shards):
        paths.append(folder / "many" / f"{i:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for j in range(100):
                for field, content in (("jpg", b"image"), ("txt", b"caption")):
                    info = tarfile.TarInfo(f"{i:05d}{j:04d}.{field}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    open_indexes(paths)
    tokenizer = build_tokenizer(TokenizerConfig(), 77)

    def ours() -> float:
        start = time.perf_counter()
        shards = IndexedShards(paths)
        size = min(4096, len(shards))
        batches = TrainBatches(shards, DataConfig(), tokenizer, image_size=224, batch_size=size, num_steps=1, seed=0)
        ids = batches.order.ids(0, size).ids
        [shards.fields(i) for i in ids[:256]]
        return 1 / (time.perf_counter() - start)

    def theirs() -> float:
        start = time.perf_counter()
        next(iter(wds.WebDataset([str(path) for path in paths], shardshuffle=False)))
        return 1 / (time.perf_counter() - start)

    yield f"starting on {num_shards:,} shards (wds: first sample only)", "starts/s", ours, theirs


def stored(folder: Path, scale: float) -> Iterator[Part]:
    """Measure batches of stored embeddings against batches of decoded images; both tokenize captions."""
    count = scaled(256, scale, 64)
    tars = shards_of(folder, SIZES[500], count)
    shards = IndexedShards(tars)
    captions = [shards.read(i, image=False).caption for i in range(count)]
    train_tokenizer(captions, folder / "tokenizer.json", vocab_size=1000)
    tokenizer = build_tokenizer(TokenizerConfig("file", str(folder / "tokenizer.json")), 77)  # CLIP's takes 0.5 ms
    out = folder / "embeddings"
    for name in ("metadata", "img_emb"):
        (out / name).mkdir(parents=True)
    np.save(out / "img_emb" / "img_emb_0.npy", np.ones((len(shards), 512), np.float16))
    keys = [shards.key(i) for i in range(len(shards))]
    pq.write_table(pa.table({"image_path": keys}), out / "metadata" / "metadata_0.parquet")
    source = hashlib.sha256(shards.fingerprint().encode()).hexdigest()
    facts = {"format_version": 1, "modality": "image", "dim": 512, "num_rows": len(shards)}
    (out / MANIFEST).write_text(json.dumps(facts | {"model_sha256": "", "source_sha256": source}))

    def rate(config: DataConfig) -> Callable[[], float]:
        batches = TrainBatches(shards, config, tokenizer, image_size=224, batch_size=64, num_steps=1, seed=0)

        def samples_per_s() -> float:
            start = time.perf_counter()
            for step in range(count // 64):
                batches[step]
            return count / (time.perf_counter() - start)

        return samples_per_s

    name = "stored embeddings against decoded 500-px JPEG"
    yield name, "samples/s", rate(DataConfig(image_embeddings=str(out))), rate(DataConfig())


def memory(folder: Path, scale: float) -> Iterator[Part]:
    """Measure the peak memory of a process that builds batches, above that after its imports, in MiB."""
    tars = shards_of(folder, SIZES[1600], scaled(256, scale, NUM_SHARDS))
    script = (
        "import sys\n"
        "import torch\n"
        "from mmvit.data.batches import DataConfig, TrainBatches\n"
        "from mmvit.data.shards import IndexedShards\n"
        "from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer\n"
        "tokenizer = build_tokenizer(TokenizerConfig(), 77)\n"
        "def kib(name): return int(open('/proc/self/status').read().split(name + ':')[1].split()[0])\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # reset the peak: importing has one of its own\n"
        "before = kib('VmRSS')\n"
        "shards = IndexedShards(sys.argv[1:])\n"
        "batches = TrainBatches(shards, DataConfig(), tokenizer, image_size=224, batch_size=len(shards), "
        "num_steps=1, seed=0)\n"
        "for step in range(4): batches[step]\n"
        "print((kib('VmHWM') - before) / 1024)\n"
    )

    def ours() -> float:
        done = subprocess.run([sys.executable, "-c", script, *tars], check=True, capture_output=True, text=True)
        return float(done.stdout)

    yield "memory of a worker, 1600-px JPEG (goal 300)", "MiB", ours, lambda: 300.0


PARTS = {"decode": decode, "read": read, "index": index, "start": start, "stored": stored, "memory": memory}


def shards_of(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Create photo-like shards, or return existing ones, and read them once into the page cache."""
    out = folder / f"{size[0]}x{size[1]}-{count}"
    if not out.exists():
        write_synthetic(out, SyntheticPhotos(*size), num_shards=NUM_SHARDS, num_samples=count)
    tars = sorted(out.glob("*.tar"))
    return [str(tar) for tar in tars if tar.read_bytes()]


def with_metadata(tars: list[str]) -> list[str]:
    """Write the samples again with a JSON like that of img2dataset: members jpg, json and txt."""
    out = Path(tars[0]).parent / "with-metadata"
    if not out.exists():
        shards = IndexedShards(tars)
        with ShardWriter(out) as writer:
            for i in range(len(shards)):
                sample = shards.read(i)
                meta = {"url": f"https://host/{i}.jpg", "caption": sample.caption, "status": "success", "exif": "{}"}
                meta |= {"key": str(i), "sha256": hashlib.sha256(sample.image).hexdigest()}
                writer.write(f"{i:09d}", {"jpg": sample.image, "txt": sample.caption, "json": meta})
    return [str(tar) for tar in sorted(out.glob("*.tar"))]


if __name__ == "__main__":
    main()
