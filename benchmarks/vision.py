"""Trains the image classifiers of configs/finetune/ that need no download, and prints their accuracies.

    python benchmarks/vision.py digits          ViT, hybrid ViT, Swin and CvT from scratch on handwritten digits
    python benchmarks/vision.py teacher         a DeiT by labels alone and with a ResNet as teacher, at equal steps
    python benchmarks/vision.py emoji           ViT, hybrid ViT, DeiT, Swin and CvT on an unseen vendor
    python benchmarks/vision.py positions       a ViT with each kind of position table
    python benchmarks/vision.py larger          a ViT trained at 224 px, measured and trained further at 384 px
    python benchmarks/vision.py emoji --seeds 0 1 2 --out results.json

Accuracies are those of the last step, on all held-out images. Each row is one run of `mmvit finetune`: its seconds
are those of the whole command, indexing and evaluations included, and its images/s those of the steps.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from report import write_report

from data_tools.demo.digits import write_digits
from data_tools.demo.emoji import EmojiOptions, write_emoji
from mmvit.checkpoint import load_classifier
from mmvit.config import FinetuneConfig
from mmvit.data.labels import open_labelled
from mmvit.eval.classify import evaluate_classifier
from mmvit.models.build import build_classifier
from mmvit.train.loop import finetune
from mmvit.train.record.run_log import read_log
from mmvit.train.start.classifier import start_from_model
from mmvit.train.start.config import load_finetune_config

POSITIONS = ("none", "learned", "learned_2d", "one_hot", "sinusoidal", "sincos_2d", "relative", "rotary")
OF_16_PX = ["model.image.patch_size=16", "model.image.depth=4"]

Row = dict[str, Any]


class Bench:
    """Data sets, written at first use, and training runs on them."""

    def __init__(self, folder: Path, steps: int | None):
        self.folder = folder
        self.steps = steps  # of each run but the teacher's; None for those of the recipes
        self.teacher: Path | None = None

    def train(self, what: str, recipe: str, seed: int, overrides: Sequence[str] = ()) -> tuple[Row, Path]:
        """Train a recipe of configs/finetune/ with overrides; returns its row and its model folder."""
        config = self.config(recipe, seed, overrides)
        start = time.perf_counter()
        model = finetune(config)
        seconds = time.perf_counter() - start
        log = read_log(Path(config.out) / "log.jsonl")
        row = {
            "what": what,
            "recipe": recipe,
            "overrides": list(overrides),
            "seed": seed,
            "steps": config.train.steps,
            "seconds": round(seconds, 1),
            "val_acc1": [line["val_acc1"] for line in log if "val_acc1" in line][-1],
            "parameters": sum(p.numel() for p in load_classifier(model).model.parameters()),
            "images_per_s": statistics.median(line["samples_per_s"] for line in log if "samples_per_s" in line),
        }
        return row, model

    def config(self, recipe: str, seed: int, overrides: Sequence[str]) -> FinetuneConfig:
        """Return the config of a new run of a recipe on the data here."""
        kind = recipe.split("_")[0]
        data, names = self.folder / kind, {"digits": "classes.txt", "emoji": "groups.txt"}[kind]
        if not data.exists():
            write_digits(data) if kind == "digits" else write_emoji(data, EmojiOptions(labels="groups"))
        config = load_finetune_config(f"finetune/{recipe}", overrides)
        config.out, config.seed = str(self.folder / f"run-{len(list(self.folder.glob('run-*')))}"), seed
        config.data.train, config.validation.data = [str(data / "train-*.tar")], [str(data / "val-*.tar")]
        config.classes = str(data / names)
        config.train.steps = self.steps or config.train.steps
        return config

    def measure(self, config: FinetuneConfig) -> float:
        """Return the accuracy of a run before its first step when it starts from another model."""
        data = open_labelled(config.validation.data, config.classes)
        model = build_classifier(config.model, data.class_names, config.preprocess.mean, config.preprocess.std)
        start_from_model(model, config)
        return evaluate_classifier(model.eval(), data.samples, config.model.image.image_size).acc1


def digits(bench: Bench, seed: int) -> Iterator[Row]:
    """Train each architecture on digits."""
    for what, recipe in (("ViT", "vit"), ("hybrid ViT", "hybrid"), ("Swin", "swin"), ("CvT", "cvt")):
        yield bench.train(what, f"digits_{recipe}", seed)[0]


def teacher(bench: Bench, seed: int) -> Iterator[Row]:
    """Train a ResNet once, and with each seed one DeiT by labels alone and one with the ResNet as teacher."""
    if bench.teacher is None:
        steps, bench.steps = bench.steps, None
        row, bench.teacher = bench.train("ResNet, the teacher", "digits_teacher", seed)
        bench.steps = steps
        yield row
    yield bench.train("DeiT, labels alone", "digits_deit", seed, ["loss.teacher=", "model.image.distilled=false"])[0]
    yield bench.train("DeiT, with a teacher", "digits_deit", seed, [f"loss.teacher={bench.teacher}"])[0]


def emoji(bench: Bench, seed: int) -> Iterator[Row]:
    """Train each architecture on the groups of emoji; the CvT then teaches the DeiT."""
    for what, recipe in (("ViT", "emoji_vit"), ("hybrid ViT", "emoji_hybrid"), ("Swin", "emoji_swin")):
        yield bench.train(what, recipe, seed)[0]
    row, model = bench.train("CvT", "emoji_cvt", seed)
    yield row
    yield bench.train("DeiT, taught by CvT", "emoji_deit", seed, [f"loss.teacher={model}"])[0]


def positions(bench: Bench, seed: int) -> Iterator[Row]:
    """Train the same ViT with each kind of position table."""
    for kind in POSITIONS:
        yield bench.train(kind, "digits_vit", seed, [f"model.image.position={kind}"])[0]


def larger(bench: Bench, seed: int) -> Iterator[Row]:
    """Train at 224 px, measure the same weights at 384 px, and train them there for a tenth of the steps."""
    row, model = bench.train("at 224 px", "digits_vit", seed, [*OF_16_PX, "model.image.image_size=224"])
    yield row
    rates = ["optim.lr=2.0e-4", "optim.muon_lr=0.002"]
    at_384 = [*OF_16_PX, "model.image.image_size=384", f"train.init={model}", *rates]
    accuracy = bench.measure(bench.config("digits_vit", seed, at_384))
    yield row | {"what": "its weights at 384 px", "overrides": at_384, "steps": 0, "seconds": 0.0, "val_acc1": accuracy}
    steps, bench.steps = bench.steps, row["steps"] // 10
    yield bench.train("fine-tuned at 384 px", "digits_vit", seed, at_384)[0]
    bench.steps = steps


EXPERIMENTS: dict[str, Callable[[Bench, int], Iterator[Row]]] = {
    "digits": digits,
    "teacher": teacher,
    "emoji": emoji,
    "positions": positions,
    "larger": larger,
}


def main() -> None:
    """Run the requested benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of each run but the teacher's, instead of those of the recipe")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows to")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), options.steps)
        for seed in options.seeds:
            for row in EXPERIMENTS[options.experiment](bench, seed):
                rows.append(row)
                print(f"seed {seed}  {row_text(row)}", flush=True)
    if len(options.seeds) > 1:
        print(f"\nmeans of {len(options.seeds)} seeds")
        for what in dict.fromkeys(row["what"] for row in rows):
            print(row_text(mean_row([row for row in rows if row["what"] == what])))
    if options.out:
        write_report(options.out, {"rows": rows})


def mean_row(rows: Sequence[Row]) -> Row:
    """Return the mean over the runs of one configuration."""
    return rows[0] | {key: statistics.mean(row[key] for row in rows) for key in ("val_acc1", "seconds", "images_per_s")}


def row_text(row: Row) -> str:
    """Return a row of the table."""
    return (
        f"{row['what']:24} {row['val_acc1']:7.2%}  {row['parameters']:>9,} parameters  {row['steps']:5} steps in "
        f"{row['seconds']:6.1f} s  {row['images_per_s']:6.0f} images/s"
    )


if __name__ == "__main__":
    main()
