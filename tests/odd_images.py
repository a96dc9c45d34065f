"""Puts odd image files of other projects through every reader and verb: `python tests/odd_images.py FOLDER...`.

Run by hand, on folders such as the unpacked sources of Pillow, libpng, gdk-pixbuf, exiv2, libgd, leptonica. Prints
how many files were tried, delivered and refused by which cause, the differences from Pillow with their reasons, and for
each verb its exit code and whether it crashed, hung or showed a traceback; exits with 1 if any did.
"""

import argparse
import collections
import hashlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_tools.make.tokenizer import train_tokenizer
from data_tools.sample.decode import decode_image, open_jpeg
from data_tools.sample.image_header import ImageError, format_of, read_header
from data_tools.tar.writer import ShardWriter
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from tests.support.image_files import drawing, encoded

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp")
FIELDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
FILE_TIMEOUT_S, VERB_TIMEOUT_S = 60, 900
TINY = (Path(__file__).parent / "tiny.yaml").read_text()
CLASSIFIER = """
model: {image: {image_size: 16, patch_size: 4, width: 32, depth: 1, num_heads: 2, pool: mean, pre_norm: false}}
preprocess: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
train: {steps: 2, batch_size: 4, precision: fp32}
"""


def gather(folders: list[Path]) -> dict[str, Path]:
    """Return the different files that have the name or the first bytes of an image, by the hash of their content."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                if data and (path.suffix.lower() in SUFFIXES or format_of(data)):
                    found.setdefault(hashlib.sha256(data).hexdigest()[:16], path)
    return found


def pillow_image(data: bytes) -> np.ndarray:
    """Pillow's own turn and conversion, on white; 16-bit grey scaled."""
    image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
    if image.width * image.height > 50_000_000:
        raise ValueError("over 50,000,000 px")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        grey = np.round(values * 255 / 65535).clip(0, 255).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def examine(data: bytes) -> tuple[str, str]:
    """Return the outcome, and in what the result differs from Pillow's; "" if in nothing."""
    header = image = ours = theirs = None
    try:
        header = read_header(data)
        image = decode_image(data)
        assert image.size == header.size, f"{image.size} decoded, {header.size} in the header"
        ours = np.asarray(image)
        if jpeg := open_jpeg(data):
            fast = jpeg.decode()
            assert fast.shape == ours.shape, f"{fast.shape} by the fast way"
            if np.abs(fast.astype(int) - ours).max() > 8:
                return "CRASH: the fast way gives another image", ""
        outcome = "delivered"
    except ImageError as error:
        outcome = f"{error.cause}: {' '.join(error.what.split())}"
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {error}", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = pillow_image(data)
    except Exception as error:
        if ours is not None:
            return outcome, f"Pillow refuses it: {type(error).__name__}: {' '.join(str(error).split())[:60]}"
    if ours is None and theirs is not None:
        return outcome, "FAULT: delivered by Pillow alone"
    if ours is not None and not np.array_equal(ours, theirs):
        transparent = b"tRNS" in data[:100_000] and header is not None and header.format == "PNG"
        reason = "level of tRNS" if transparent else "UNEXPLAINED"
        return (
            outcome,
            f"other size: {ours.shape} {theirs.shape}" if ours.shape != theirs.shape else f"pixels: {reason}",
        )
    return outcome, ""


def walk(files: dict[str, Path]) -> tuple[dict[str, bytes], int]:
    """Examine each file, at most a minute long; returns their contents by name, and the number of faults."""
    outcomes: collections.Counter[str] = collections.Counter()
    differences: dict[str, list[str]] = collections.defaultdict(list)
    faults: list[str] = []
    stored = {}
    pool = multiprocessing.Pool(1)
    for name, path in files.items():
        data = path.read_bytes()
        field = FIELDS.get(format_of(data) or "", path.suffix.lower().strip("."))
        stored[f"{name}.{field if field in FIELDS.values() else 'jpg'}"] = data
        try:
            outcome, difference = pool.apply_async(examine, (data,)).get(FILE_TIMEOUT_S)
        except multiprocessing.TimeoutError:
            outcome, difference = "HANG", ""
            pool.terminate()
            pool = multiprocessing.Pool(1)
        if outcome.startswith(("CRASH", "HANG")):
            faults.append(f"{path}: {outcome}")
        outcomes[re.sub(r"\d+", "N", outcome)] += 1
        if difference:
            differences[re.sub(r"0x[0-9a-f]+|\d{3,}", "N", difference)].append(path.name)
    pool.terminate()
    print(f"tried {len(files)}, delivered {outcomes['delivered']}, refused {len(files) - outcomes['delivered']}:")
    for outcome, count in outcomes.most_common():
        print(f"  {count:5}  {outcome[:110]}")
    print("differences from Pillow:")
    for difference, names in sorted(differences.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):5}  {difference[:100]}  ({', '.join(names[:3])})")
    print(f"crashes and hangs: {len(faults)}", *faults, sep="\n  ")
    return stored, len(faults)


def write_models(work: Path) -> None:
    """Train a dual encoder and a classifier for two steps on drawings."""
    with ShardWriter(work / "clean", "train") as writer:
        for i in range(16):
            caption = f"drawing number {i} on a wall"
            writer.write(f"{i:03d}", {"png": encoded(drawing(24 + i, 20), "PNG"), "txt": caption, "cls": i % 2})
    (work / "classes.txt").write_text("left\nright\n")
    train_tokenizer([f"drawing number {i} on a wall" for i in range(16)], work / "tokenizer.json", vocab_size=300)
    tokenizer = build_tokenizer(TokenizerConfig("file", str(work / "tokenizer.json")), 24)
    text = TINY.format(folder=work, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text)
    text = re.sub(r"  captions:\n(    - .*\n)+", "", text).replace(f"{work}/train-*", f"{work}/clean/train-*")
    text = text.replace("steps: 20, batch_size: 32", "steps: 2, batch_size: 4")
    (work / "dual.yaml").write_text(text)
    (work / "classifier.yaml").write_text(CLASSIFIER)
    data = [f"data.train=[{work}/clean/train-*.tar]", f"classes={work}/classes.txt"]
    for verb, config, more in (("pretrain", "dual", []), ("finetune", "classifier", data)):
        done = subprocess.run(
            [sys.executable, "-m", "mmvit", verb, f"{work}/{config}.yaml", f"out={work}/{config}", *more],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def run_verbs(work: Path, stored: dict[str, bytes]) -> int:
    """Make a folder, class folders and shards of the files and start every verb on them; returns the faults."""
    for i, (name, data) in enumerate(stored.items()):
        for folder in ("flat", f"classes/{('even', 'odd')[i % 2]}"):
            (work / folder).mkdir(parents=True, exist_ok=True)
            (work / folder / name).write_bytes(data)
    with ShardWriter(work / "shards", "odd", max_samples=500) as writer:
        for i, (name, data) in enumerate(stored.items()):
            key, field = name.split(".")
            writer.write(key, {field: data, "txt": f"file {key}", "cls": i % 2})
    shards, flat = f"{work}/shards/odd-*.tar", sorted((work / "flat").iterdir())
    good = [path for path in flat if _is_good(path)]
    dual, classifier = f"{work}/dual/model", f"{work}/classifier/model"
    tools, mmvit = [sys.executable, "-m", "data_tools"], [sys.executable, "-m", "mmvit"]
    make = [*tools, "make", "--no-captions", "--max-bad", "1"]
    names = ["--classes", f"{work}/classes.txt"]
    verbs = {
        "make folder": [*make, f"{work}/flat", f"{work}/m1"],
        "make --resize 32": [*make, f"{work}/flat", f"{work}/m2", "--resize", "32"],
        "make --format webp": [*make, f"{work}/classes", f"{work}/m3", "--format", "webp", "--kind", "classes"],
        "check": [*tools, "check", shards],
        "check --no-decode": [*tools, "check", shards, "--no-decode"],
        "stats": [*tools, "stats", shards, "--json"],
        "peek": [*tools, "peek", shards, "--out", f"{work}/peek.png", "-n", "1000"],
        "filter": [*tools, "filter", shards, "--where", "width >= 1", "--out", f"{work}/filtered"],
        "dedup": [*tools, "dedup", shards, "--out", f"{work}/unique"],
        "repair": [*tools, "repair", shards, "--out", f"{work}/repaired"],
        "check repaired": [*tools, "check", f"{work}/repaired"],
        "embed shards": [*mmvit, "embed", dual, shards, "--out", f"{work}/e1"],
        "embed repaired": [*mmvit, "embed", dual, f"{work}/repaired", "--out", f"{work}/e2"],
        "embed folder": [*mmvit, "embed", dual, f"{work}/flat", "--out", f"{work}/e3"],
        "zero-shot good": [*mmvit, "zero-shot", dual, *map(str, good), *names, "--json"],
        "classify good": [*mmvit, "classify", classifier, *map(str, good), "--json"],
        "zero-shot all": [*mmvit, "zero-shot", dual, *map(str, flat), *names],
        "classify all": [*mmvit, "classify", classifier, *map(str, flat)],
        "finetune shards": [
            *mmvit,
            "finetune",
            f"{work}/classifier.yaml",
            f"data.train=[{shards}]",
            f"classes={work}/classes.txt",
        ],
        "finetune folder": [*mmvit, "finetune", f"{work}/classifier.yaml", f"data.train=[{work}/classes]"],
    }
    faults = 0
    print(f"{'verb':20}{'exit':>6}{'s':>7}  last line")
    for name, command in verbs.items():
        more = ["--dry-run", f"out={work}/dry"] if name.startswith("finetune") else []
        start = time.monotonic()
        try:
            done = subprocess.run([*command, *more], capture_output=True, timeout=VERB_TIMEOUT_S, cwd=work)
        except subprocess.TimeoutExpired:
            print(f"{name:20}  HANG")
            faults += 1
            continue
        text = (done.stdout + done.stderr).decode(errors="replace")
        wrong = "Traceback" in text or done.returncode in (1, -11, -6) or "Warning" in text
        faults += wrong
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1][:70] if lines else ""
        print(
            f"{name:20}{done.returncode:6}{time.monotonic() - start:7.1f}  {'FAULT' if wrong else ''} {last}",
            flush=True,
        )
        if wrong:
            print("\n".join(lines[-25:]))
    return faults


def _is_good(path: Path) -> bool:
    try:
        decode_image(path.read_bytes())
    except ImageError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--no-verbs", action="store_true", help="readers only")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    stored, faults = walk(gather(options.folders))
    if not options.no_verbs:
        with tempfile.TemporaryDirectory() as work:
            write_models(Path(work))
            faults += run_verbs(Path(work), stored)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
