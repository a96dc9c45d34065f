"""Breaks the product in thirty places, one at a time, and shows which test catches each: `python tests/breaks.py`.

Run by hand, before and after a restructuring. A break is found by its text anywhere in the tree, its tests by the names
of their files, so that the same list runs on a tree of another layout: `python tests/breaks.py --tree FOLDER`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_tools", "mmvit")


class Break(NamedTuple):
    """A piece of code that occurs once, what it is replaced by, and the files of tests that are to fail."""

    name: str
    code: str
    replacement: str
    tests: tuple[str, ...]


BREAKS = (
    Break("attention ignores its mask", "attn_mask=mask, is_causal", "attn_mask=None, is_causal", ("test_attention",)),
    Break("QuickGELU with 1.7", "torch.sigmoid(1.702 * x)", "torch.sigmoid(1.7 * x)", ("test_feed_forward",)),
    Break(
        "a norm without its epsilon",
        "eps=norm_eps)\n        self.attention = Attention(width, num_heads, causal",
        ")\n        self.attention = Attention(width, num_heads, causal",
        ("test_timm_vit",),
    ),
    Break(
        "positions resampled without antialiasing",
        'size=(new, old), mode="bicubic", antialias=True',
        'size=(new, old), mode="bicubic"',
        ("test_positions",),
    ),
    Break(
        "Swin rolls the other way",
        ".roll((-shift[0], -shift[1]), dims=(1, 2))",
        ".roll(shift, dims=(1, 2))",
        ("test_swin",),
    ),
    Break(
        "text pooled at its first end",
        "ends = (ids == self.end_of_text).long()",
        "ends = (ids != self.end_of_text).long()",
        ("test_dual_encoder", "test_text", "test_open_clip"),
    ),
    Break(
        "softmax loss with half of the positives",
        "row_gap = pairs.own_images(rows) - of_image",
        "row_gap = pairs.own_images(rows) - of_image / 2",
        ("test_contrastive",),
    ),
    Break(
        "sigmoid loss forgets the bias",
        "logits = tile.logits.add_(bias)",
        "logits = tile.logits",
        ("test_siglip", "test_contrastive"),
    ),
    Break(
        "negatives of this rank alone",
        "dist.all_gather_into_tensor(gathered, rows.detach().contiguous())",
        "gathered.copy_(rows.detach().repeat(world()[1], *[1] * (rows.ndim - 1)))",
        ("test_contracts",),
    ),
    Break(
        "every epoch in the same order",
        "np.random.SeedSequence((self.seed, epoch, stream))",
        "np.random.SeedSequence((self.seed, stream))",
        ("test_order",),
    ),
    Break(
        "an unstable mix of data sets",
        "count + self.num_samples) // (2 * self.num_samples)",
        "count) // (2 * self.num_samples)",
        ("test_order",),
    ),
    Break(
        "hashes are not compared",
        "if hashlib.sha256(data).digest() != index.digest(i, field):",
        "if False:",
        ("test_shard_reader", "test_reader"),
    ),
    Break(
        "checksums of headers are not compared",
        'if (int(checksum.strip(b" \\0"), 8) - total) % 65521:',
        "if False:",
        ("test_tar_headers", "test_headers", "test_tar_scan", "test_scan"),
    ),
    Break(
        "files are renamed before they are synced",
        "            os.fsync(file.fileno())\n        rename_synced",
        "            pass\n        rename_synced",
        ("test_saver_power_cut", "test_atomic", "test_files"),
    ),
    Break(
        "files of a checkpoint are not verified",
        "and file_sha256(path) == digest",
        "",
        ("test_saver_bit_flips", "test_checkpoint"),
    ),
    Break(
        "gradients are not clipped", 'float("inf") if clip_norm is None else clip_norm', 'float("inf")', ("test_step",)
    ),
    Break("steps that are not finite count", "if not math.isfinite(value):", "if False:", ("test_guard",)),
    Break(
        "the optimizer is not restored",
        "restore_state(self.optimizers, ",
        "(lambda *a: None)(self.optimizers, ",
        ("test_loop",),
    ),
    Break(
        "EMA without its warm-up",
        "decay = min(self.decay, (1 + step) / (10 + step))",
        "decay = self.decay",
        ("test_ema",),
    ),
    Break(
        "warm-up a step too late",
        "rise = min(1.0, (step + 1) / (warmup + 1))",
        "rise = min(1.0, step / (warmup + 1))",
        ("test_schedule",),
    ),
    Break(
        "Muon without Nesterov",
        'updates = torch._foreach_lerp(gradients, buffers, group["momentum"])',
        "updates = buffers",
        ("test_muon",),
    ),
    Break(
        "red and blue get each other's mean",
        "CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)",
        "CLIP_MEAN = (0.40821073, 0.4578275, 0.48145466)",
        ("test_transforms", "test_open_clip"),
    ),
    Break(
        "crops are drawn from one corner",
        "augment.crop_area[0], augment.crop_area[1])",
        "augment.crop_area[1], augment.crop_area[1])",
        ("test_transforms",),
    ),
    Break(
        "class embeddings are not of unit length",
        "return F.normalize(rows.mean(dim=1), dim=-1)",
        "return rows.mean(dim=1)",
        ("test_zero_shot",),
    ),
    Break("the worst results first", "descending=True, stable=True", "descending=False, stable=True", ("test_search",)),
    Break("a brace range loses its last shard", "int(last) + 1", "int(last)", ("test_expand",)),
    Break(
        "check decodes nothing",
        "fault = read_content(reader.fields(0, i), index.fields, decode).fault",
        "fault = read_content(reader.fields(0, i), index.fields, False).fault",
        ("test_check",),
    ),
    Break(
        "perceptual hashes over the mean", "low > np.median(low)", "low > np.mean(low)", ("test_metadata", "test_table")
    ),
    Break("near copies of any colour", "return same\n", "return np.ones_like(same)\n", ("test_dedup",)),
    Break(
        "resharding forgets its seed",
        "SeedSequence((seed, 0))).random_raw(len(chosen))",
        "SeedSequence((0, 0))).random_raw(len(chosen))",
        ("test_selection", "test_write", "test_reshard"),
    ),
)


class Result(NamedTuple):
    """What became of a break: the test that failed first, or why there is none."""

    caught_by: str | None
    reason: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of breaks; default: all")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to break (a copy of it)")
    options = parser.parse_args()
    chosen = [each for each in BREAKS if not options.names or any(name in each.name for name in options.names)]
    num_caught = 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "tree"
        shutil.copytree(options.tree, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        files = sorted({test for each in chosen for test in files_of(copy, each)})
        whole = run_tests(copy, files)
        print(f"without a break: {whole.stdout.splitlines()[-1]}", flush=True)
        if whole.returncode:
            sys.exit(whole.stdout)
        for each in chosen:
            start = time.monotonic()
            result = try_break(copy, each)
            num_caught += result.caught_by is not None
            what = f"caught by {result.caught_by}" if result.caught_by else f"NOT CAUGHT: {result.reason}"
            print(f"{each.name:<45} {time.monotonic() - start:5.0f} s  {what}", flush=True)
    print(f"{num_caught} of {len(chosen)} breaks are caught")
    sys.exit(num_caught < len(chosen))


def try_break(tree: Path, each: Break) -> Result:
    """Break the tree, run the tests, and restore it."""
    places = [path for path in sources(tree) if each.code in path.read_text(encoding="utf-8")]
    texts = [path.read_text(encoding="utf-8") for path in places]
    if len(texts) != 1 or texts[0].count(each.code) != 1:
        return Result(None, f"its code is in {len(places)} files")
    tests = files_of(tree, each)
    if not tests:
        return Result(None, "there are no such tests")
    places[0].write_text(texts[0].replace(each.code, each.replacement), encoding="utf-8")
    try:
        done = run_tests(tree, tests)
    finally:
        places[0].write_text(texts[0], encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return Result(failed[1], "") if done.returncode and failed else Result(None, "the tests pass")


def files_of(tree: Path, each: Break) -> list[Path]:
    return sorted(path for name in each.tests for path in (tree / "tests").rglob(f"{name}.py"))


def sources(tree: Path) -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((tree / package).rglob("*.py"))


def run_tests(tree: Path, tests: list[Path]) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    # In one process, whatever the configuration of the tree says.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow and not gpu"]
    command = [sys.executable, "-m", "pytest", *options, "--import-mode=importlib", *map(str, tests)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=900)


if __name__ == "__main__":
    main()
