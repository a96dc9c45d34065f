"""Random values for random config keys, through all that `--dry-run` does: it accepts a run that can learn, or refuses.

By hand, on all keys: `python tests/support/config_fuzz.py --trials 20000 --workers 2`. It prints the outcomes by exit
code, and each seed whose outcome is a fault: another exit code, a traceback, or an accepted run that cannot learn.
"""

import argparse
import collections
import contextlib
import io
import json
import logging
import math
import multiprocessing
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from data_tools.core.program import as_user_error
from data_tools.make.tokenizer import train_tokenizer
from data_tools.tar.writer import ShardWriter
from mmvit.config import FinetuneConfig, PretrainConfig, load_config
from mmvit.data.captions import CaptionConfig
from mmvit.data.curriculum import Stage
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.keys import Key, declared, key_of
from mmvit.models.image_towers import tower_config
from mmvit.train import loop
from mmvit.train.rehearsal import rehearse
from mmvit.train.run import Run
from mmvit.train.start import size
from mmvit.train.start.config import load_finetune_config

NUM_IMAGES, CLASSES = 24, ("red", "green", "blue")
MEMORY = 2**26  # bytes that a model may take here, so that no trial is slow
MAX_BATCH = 2**20  # bytes of the images of a batch that is trained on
# Exit codes of paths that name nothing, or the wrong thing: bad data, and a bad model folder.
OF_PATHS = (3, 4)
PATHS = ("data.train", "data.image_embeddings", "zero_shot.data", "validation.data", "train.init", "loss.teacher")
PATHS += ("tokenizer.path", "classes", "zero_shot.class_names", "out", "data.captions", "loss.kind")

PRETRAIN = """
data: {{train: ["{folder}/web", "{folder}/clean"], num_workers: 0, captions: [{{source: txt}}]}}
tokenizer: {{kind: file, path: "{folder}/tokenizer.json"}}
model:
  embed_dim: 16
  image: {image}
  text: {{vocab_size: {vocab}, end_of_text: {end}, context_length: 8, width: 16, depth: 1, num_heads: 2}}
zero_shot: {{data: ["{folder}/web"], class_names: "{folder}/names.txt"}}
train: {{steps: 20, batch_size: 8}}
"""
FINETUNE = """
data: {{train: ["{folder}/web"], num_workers: 0}}
classes: "{folder}/names.txt"
model: {{image: {image}}}
validation: {{data: ["{folder}/clean"]}}
train: {{steps: 20, batch_size: 8}}
"""
IMAGES = {
    "vit": "{kind: vit, image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2}",
    "swin": "{kind: swin, image_size: 32, width: 8, depths: [1, 1], num_heads: [1, 2], window_size: 4}",
    "cvt": "{kind: cvt, image_size: 32, widths: [8, 8, 8], depths: [1, 1, 1], num_heads: [1, 1, 1]}",
    "resnet": "{kind: resnet, image_size: 32, width: 16, depths: [1, 1, 1, 1], stem_width: 8, num_heads: 4}",
}
CONFIGS: dict[str, type] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
LISTS = {"data.captions": CaptionConfig, "curriculum": Stage}  # keys of configs of their own
TEXTS = (
    "",
    "x",
    "none/at/all",
    "a,b",
    "\\0",
    "{}",
    "caf\u00e9",
    "a photo of a {}",
    "image_tower.*",
    "*",
    "[",
    "~",
    "0123",
)
WRONG = ("null", "true", "[]", "{}", "[[1]]", "{a: 1}", "x", "''", "[null]", "1e400", "-0.0", ".nan", "-.inf", ".inf")


class Outcome(NamedTuple):
    """What became of a trial: the exit code, or 1 for a traceback; a text if it is a fault."""

    code: int
    fault: str = ""


def make_data(folder: Path) -> None:
    """Write two data sets whose shards and keys have equal names, a tokenizer, class names and the configs."""
    rng = np.random.default_rng(0)
    for name, number in (("web", NUM_IMAGES), ("clean", NUM_IMAGES // 2)):
        with ShardWriter(folder / name) as writer:
            for i in range(number):
                sink = io.BytesIO()
                Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(sink, "PNG")
                text = f"a {CLASSES[i % 3]} thing number {i}"
                meta = {"names": {"en": text, "ko": text[::-1]}}
                writer.write(f"key{i}", {"png": sink.getvalue(), "txt": text, "cls": str(i % 3), "json": meta})
    texts = [f"a {name} thing number {i}" for name in CLASSES for i in range(30)]
    train_tokenizer(iter(texts), folder / "tokenizer.json", vocab_size=300)
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n")
    tokenizer = build_tokenizer(TokenizerConfig("file", str(folder / "tokenizer.json")), 8)
    values = {"folder": folder, "vocab": tokenizer.vocab_size, "end": tokenizer.end_of_text}
    for kind, image in IMAGES.items():
        (folder / f"pretrain_{kind}.yaml").write_text(PRETRAIN.format(image=image, **values))
        (folder / f"finetune_{kind}.yaml").write_text(FINETUNE.format(image=image, **values))


def draw(rng: random.Random) -> tuple[str, str, list[str]]:
    """Draw a verb, the name of its config, and one to four keys with values."""
    verb, kind = rng.choice(sorted(CONFIGS)), rng.choice(["vit", "vit", "vit", *IMAGES])
    config, found = CONFIGS[verb](), list[str]()
    config.model.image = tower_config(kind)
    keys = declared(config)
    for name in rng.sample(sorted(keys), rng.choice([1, 1, 1, 2, 3, 4])):
        if name in LISTS:
            items = [_item(rng, LISTS[name]) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
            found.append(f"{name}=[{', '.join(items)}]")
        else:
            found.append(f"{name}={_value(rng, keys[name], _type_of(config, name))}")
    return verb, f"{verb}_{kind}.yaml", found


def trial(folder: Path, seed: int, learn: bool = False) -> Outcome:
    """Try what a seed draws; `learn` also trains two steps of what is accepted."""
    verb, name, drawn = draw(random.Random(seed))
    arguments = [str(folder / name), [f"out={folder}/run", *drawn]]
    try:
        with _quiet():
            load: Any = load_finetune_config if verb == "finetune" else lambda *a: load_config(PretrainConfig, *a)
            config = load(*arguments)
            with patch.object(loop, "rehearse", _rehearse_small):
                loop.check(config)
    except Exception as error:
        user_error = as_user_error(error)
        if user_error is None:
            return Outcome(1, f"{name} {drawn}: {traceback.format_exc(limit=-4)}")
        allowed = [2, *(OF_PATHS if any(text.startswith(PATHS) for text in drawn) else ())]
        fault = "" if user_error.exit_code in allowed else f"{name} {drawn}: {user_error.exit_code} {user_error}"
        return Outcome(user_error.exit_code, fault)
    cannot = cannot_learn(config)
    if not cannot and learn:
        try:
            cannot = _unmoved(config)
        except Exception as error:
            cannot = f"two steps end with {error!r}: {traceback.format_exc(limit=-4)}"
    return Outcome(0, f"{name} {drawn}: accepted, but {cannot}" if cannot else "")


def _rehearse_small(run: Run, step: int) -> list[str]:
    return rehearse(run, step) if run.task.batches.num_bytes <= MAX_BATCH else []


def cannot_learn(config: Any) -> str:
    """Return why a config cannot learn, "" if nothing speaks against it."""
    optim, train = config.optim, config.train
    checks = {
        "a rate is not positive": not all(0 < rate < math.inf for rate in (optim.lr, optim.muon_lr)),
        "the weights decay at once": optim.lr * optim.weight_decay >= 1,
        "the epsilon is 0": optim.eps <= 0,
        "a deviation is not positive": min(config.preprocess.std) <= 0,
        "a step has no samples": train.batch_size < 1 or train.steps < 1,
        "no pair has a negative": isinstance(config, PretrainConfig) and train.batch_size < 2,
        "the labels are lost": isinstance(config, FinetuneConfig) and config.loss.label_smoothing >= 1,
        "a batch holds a sample twice": train.batch_size > NUM_IMAGES + NUM_IMAGES // 2,
    }
    return ", ".join(name for name, wrong in checks.items() if wrong)


def _unmoved(config: Any) -> str:
    """Train two steps; return what went wrong."""
    with _quiet():
        run = loop.open_run(config, loop.open_accelerator(config), loop.Watch(config.train.timeout_s))
        if run.task.batches.num_bytes > MAX_BATCH:
            return ""
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        for step in range(2):
            micro = config.train.micro_batches
            result = run.step(step, [run.task.batches[step * micro + i] for i in range(micro)])
            if result.skipped:
                return f"step {step} is skipped: {result.skipped}"
        pairs = zip(before, run.model.parameters(), strict=True)
        moved = any(not torch.equal(old, new) for old, new in pairs)
        return "" if moved or min(config.optim.lr, config.optim.muon_lr) < 1e-6 else "two steps change no weight"


def _type_of(config: Any, name: str) -> Any:
    *path, last = name.split(".")
    for part in path:
        config = getattr(config, part)
    return next(entry.type for entry in config.__dataclass_fields__.values() if entry.name == last)


def _item(rng: random.Random, cls: type) -> str:
    config = cls()
    names = sorted(config.__dataclass_fields__)
    drawn = rng.sample(names, rng.randint(0, len(names)))
    fields = config.__dataclass_fields__
    values = [f"{name}: {_value(rng, key_of(fields[name]) or Key(''), fields[name].type)}" for name in drawn]
    return f"{{{', '.join(values)}}}"


def _value(rng: random.Random, key: Key, kind: Any) -> str:
    """Draw a value for a key as text: of its type and within its bounds, at them, just beyond, or of no sense."""
    if rng.random() < 0.1:
        return rng.choice(WRONG)
    options = [option for option in get_args(kind) if option is not type(None)]
    if type(None) in get_args(kind):
        return "null" if rng.random() < 0.2 else _value(rng, key, options[0])
    if get_origin(kind) is Literal:
        return str(rng.choice(options))
    if get_origin(kind) is list:
        length = rng.choice([key.min_length or rng.randint(0, 3), rng.randint(0, 5)])
        return f"[{', '.join(_value(rng, key, options[0]) for _ in range(length))}]"
    if get_origin(kind) is dict:
        items = [f"{name}: {_value(rng, key, options[1])}" for name in rng.sample(["en", "ko", "fr"], 2)]
        return f"{{{', '.join(items)}}}"
    if kind is bool:
        return rng.choice(["true", "false"])
    if kind in (int, float):
        return _number(rng, key, kind)
    return json.dumps(rng.choice(TEXTS), ensure_ascii=False)


def _number(rng: random.Random, key: Key, kind: type) -> str:
    low, high = key.ge if key.gt is None else key.gt, key.le if key.lt is None else key.lt
    low, high = low or 0, high or 0
    if rng.random() < 0.6:
        value = rng.choice([rng.uniform(low, min(high, low + 2)), rng.uniform(low, min(high, low + 64)), 1, 2, 4, 8])
    else:
        value = rng.choice([low, high, low - 1, high + 1, 0, -1, 0.5, 1e-30, 1e30, 1e12, rng.uniform(low, high)])
    return str(int(value) if kind is int and rng.random() < 0.9 else value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _worker(arguments: tuple[str, int, int]) -> list[tuple[int, Outcome]]:
    folder, first, last = arguments
    torch.set_num_threads(1)
    size.machine_memory = lambda: MEMORY
    return [(seed, trial(Path(folder), seed, learn=seed % 20 == 0)) for seed in range(first, last)]


def main() -> None:
    """Run the trials that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=50, help="trials that are repeated by the program itself")
    options = parser.parse_args()
    codes: collections.Counter[int] = collections.Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        last = options.first + options.trials
        tasks = [(folder, first, min(first + 100, last)) for first in range(options.first, last, 100)]
        found: dict[int, int] = {}
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            for done, outcomes in enumerate(pool.imap_unordered(_worker, tasks), 1):
                for seed, outcome in outcomes:
                    codes[outcome.code] += 1
                    found[seed] = outcome.code
                    faults += bool(outcome.fault)
                    if outcome.fault:
                        print(f"seed {seed}: {outcome.fault}", flush=True)
                print(f"{done * 100} of {options.trials}: {dict(codes)}, {faults} faults", file=sys.stderr, flush=True)
        for seed in sorted(found)[:: max(1, len(found) // options.programs)][: options.programs]:
            faults += _program(Path(folder), seed, found[seed])
    print(f"{options.trials} trials: {dict(sorted(codes.items()))}, {faults} faults")
    sys.exit(bool(faults))


def _program(folder: Path, seed: int, code: int) -> bool:
    """Return whether the program itself ends a trial with another exit code, or with a traceback."""
    verb, name, drawn = draw(random.Random(seed))
    command = [sys.executable, "-m", "mmvit", verb, str(folder / name), f"out={folder}/run", *drawn, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    is_fault = done.returncode != code or "Traceback" in done.stderr
    if is_fault:
        print(f"seed {seed}: the program ends with {done.returncode}, not {code}: {done.stderr[-2000:]}")
    return is_fault


if __name__ == "__main__":
    main()
