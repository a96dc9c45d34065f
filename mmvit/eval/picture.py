"""The report image of a quickstart: its curves, and unseen images with their predicted names."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.core.files import write_atomic
from data_tools.sample.decode import decode_image
from mmvit.data.shards import IndexedShards
from mmvit.eval.classify import Accuracy

NUM_DRAWINGS = 24
COLUMNS = 8


def draw_report(
    path: Path,
    report: dict[str, Any],
    log: Sequence[dict[str, Any]],
    shards: IndexedShards,
    result: Accuracy,
    names: Sequence[str],
) -> None:
    """Plot loss, accuracy and a sample of the images of the held-out vendor, wrong names in red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-NUM_DRAWINGS // COLUMNS)
    figure = plt.figure(figsize=(14, 4 + 1.9 * rows), layout="constrained")
    curves, drawings = np.asarray(figure.subfigures(2, 1, height_ratios=[4, 1.9 * rows]))
    left, right = curves.subplots(1, 2)
    _curve(left, log, "loss", "contrastive loss", scale=1)
    _curve(right, log, "zero_shot_acc1", "zero-shot top-1 during training, % of images of a held-out vendor", scale=100)
    english = report["zero_shot"]["en"]
    drawings.suptitle(
        f"Images of a held-out vendor with the predicted one of {report['num_classes']} names "
        f"(top-1 {english['acc1']:.1%}, top-5 {english['acc5']:.1%}); wrong ones in red"
    )
    chosen = np.linspace(0, len(result.samples) - 1, NUM_DRAWINGS).astype(int).tolist()
    for axes, i in zip(drawings.subplots(rows, COLUMNS).flat, chosen, strict=True):
        axes.imshow(decode_image(shards.read(int(result.samples[i])).image))
        guess, truth = int(result.best[i, 0]), int(result.labels[i])
        axes.set_title(_wrapped(names[guess]), fontsize=9, color="black" if guess == truth else "firebrick")
        axes.axis("off")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
    write_atomic(path, file.getvalue())


def _curve(axes: Any, log: Sequence[dict[str, Any]], name: str, title: str, scale: float) -> None:
    points = [(line["step"], scale * line[name]) for line in log if name in line]
    if points:
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)


def _wrapped(name: str, width: int = 18) -> str:
    return "\n".join(textwrap.wrap(name, width)[:2])
