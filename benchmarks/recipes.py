"""Compares ways of training on the quickstart's data at equal time: one table of accuracy on the unseen vendor.

    python benchmarks/recipes.py                         all variants, 2 minutes each
    python benchmarks/recipes.py quickstart sigmoid --minutes 5 --seeds 0 1
    python benchmarks/recipes.py quickstart --steps 2    so many steps, whatever their time
    python benchmarks/recipes.py --out results.json      also write the figures

Each variant is configs/quickstart.yaml with the overrides below, and as many steps as its own measured step time fits
into the minutes; every run starts from the same images, names and tokenizer. Accuracy is zero-shot over all names.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_report

from data_tools.demo.emoji import EmojiOptions, write_emoji
from data_tools.tar.expand import expand_shards
from mmvit.config import PretrainConfig, load_config
from mmvit.data.prompts import load_templates
from mmvit.data.shards import IndexedShards
from mmvit.eval.encoder import load
from mmvit.eval.zero_shot import evaluate_zero_shot
from mmvit.quickstart.run import LANGUAGES, prepare_tokenizer
from mmvit.train.loop import measure_step_time, pretrain
from mmvit.train.record.run_log import read_log

SMALL_FIRST = "curriculum=[{until: 0.5, image_size: 32}, {until: 1}]"
VARIANTS: dict[str, list[str]] = {
    "quickstart": [],
    "adamw 1e-3": ["optim.name=adamw", "optim.lr=1.0e-3"],
    "adamw 5e-4": ["optim.name=adamw", "optim.lr=5.0e-4"],
    "lamb 8e-3": ["optim.name=lamb", "optim.lr=8.0e-3"],
    "sigmoid": ["loss.kind=sigmoid", "model.initial_logit_scale=10", "model.initial_logit_bias=-10"],
    "joint captions": ["loss.joint_captions=true"],
    "32 px, then 48": [SMALL_FIRST],
    "patch dropout 0.33, then none": ["curriculum=[{until: 0.7, patch_dropout: 0.33}, {until: 1}]"],
    "8 text tokens, then all": ["curriculum=[{until: 0.5, text_tokens: 8}, {until: 1}]"],
    "ema 0.99": ["optim.ema_decay=0.99"],
}


def main() -> None:
    """Train and evaluate the requested variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", choices=[*VARIANTS, []], help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="steps of each run, instead of those that fit the minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        write_emoji(data, EmojiOptions())
        for seed in options.seeds:
            for name in options.variants or VARIANTS:
                rows.append(train(name, data, Path(temporary) / f"{len(rows)}", seed, options))
                print(row_text(rows[-1]), flush=True)
    if options.out:
        write_report(options.out, {"rows": rows})


def train(name: str, data: Path, out: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant for so many steps, or minutes of steps, and return its row."""
    config = load_config(PretrainConfig, "quickstart", VARIANTS[name], complete=False)
    config.out, config.seed = str(out), seed
    config.data.train = [str(data / "train-*.tar")]
    prepare_tokenizer(config, data, data / "tokenizer.json")
    config.train.steps = options.steps or max(20, round(options.minutes * 60 / measure_step_time(config)))
    config.train.save_every = config.train.steps
    start = time.perf_counter()
    model = load(pretrain(config))
    seconds = time.perf_counter() - start
    shards = IndexedShards(expand_shards(str(data / "val-*.tar")), require_caption=False)
    accuracies = {}
    for language, templates in LANGUAGES.items():
        names = (data / f"names.{language}.txt").read_text(encoding="utf-8").splitlines()
        accuracies[language] = evaluate_zero_shot(model, shards, names, load_templates(templates)).acc1
    rates = [line["samples_per_s"] for line in read_log(out / "log.jsonl")]
    return {
        "variant": name,
        "seed": seed,
        "steps": config.train.steps,
        "samples": config.train.steps * config.train.batch_size,
        "samples_per_s": statistics.median(rates),
        "seconds": round(seconds, 1),
        **accuracies,
    }


def row_text(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    return (
        f"{row['variant']:32} seed {row['seed']}  {row['steps']:5} steps in {row['seconds']:6.1f} s  "
        f"{row['samples_per_s']:6.0f} samples/s  top-1 en {row['en']:6.1%}  ko {row['ko']:6.1%}"
    )


if __name__ == "__main__":
    main()
