"""Plots of the training curves of one or more runs."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from data_tools.core.errors import CheckpointError, UsageError
from data_tools.core.files import make_folder, write_atomic
from data_tools.core.near import near_path
from mmvit.config import read_tree
from mmvit.train.record.log_lines import CHANGED, read_log

Numbers = Float[np.ndarray, " n"]


class Panel(NamedTuple):
    """How a value of the log is plotted."""

    name: str
    title: str
    factor: float = 1.0
    log_scale: bool = False


PANELS = (
    Panel("loss", "loss"),
    Panel("zero_shot_acc1", "zero-shot top-1, %", factor=100),
    Panel("val_acc1", "accuracy, %", factor=100),
    Panel("val_loss", "held-out loss"),
    Panel("val_text_to_image_r1", "held-out R@1, text to image, %", factor=100),
    Panel("val_image_to_text_r1", "held-out R@1, image to text, %", factor=100),
    Panel("lr", "learning rate"),
    Panel("grad_norm", "gradient norm", log_scale=True),
    Panel("logit_scale", "logit scale"),
    Panel("param_norm", "parameter norm"),
    Panel("samples_per_s", "samples/s"),
    Panel("data_wait", "waiting for data, % of the time", factor=100),
    Panel("mfu", "model FLOPs utilisation, %", factor=100),
)
NOISY = ("loss", "grad_norm", "samples_per_s", "data_wait", "mfu")
SKIPPED = "skipped_steps"  # so far
X_LABELS = {"step": "step", "samples": "samples seen", "hours": "hours of training"}
# The colour-blind safe palette of Okabe and Ito; from the ninth run on with dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
WIDTH_PX, DPI = 1600, 100
MAX_RAW_POINTS = 2000  # of a curve


class Curves(NamedTuple):
    """The curves of one run: the x value of each logged line, and its values, NaN if missing."""

    name: str
    x: Numbers
    numbers: dict[str, Numbers]


def plot_runs(runs: Sequence[Path], out: Path, x: str = "step") -> dict[str, Any]:
    """Plot the curves of the runs into a PNG and return the last value of each curve.

    Args:
        runs: run folders, or `log.jsonl` files.
        out: the PNG file to write.
        x: step, samples or hours.

    Raises:
        UsageError: matplotlib is missing, or a run has no log or no values for the x axis.
        CheckpointError: a log is damaged.
    """
    if x not in X_LABELS:
        raise UsageError(f"--x is {x!r}", where="--x", hint=f"choose from {', '.join(X_LABELS)}")
    for run in runs:
        if not run.exists():
            raise UsageError("there is no such run", where=str(run), hint=near_path(run) or "pass the folder of a run")
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UsageError("plots need matplotlib", hint="pip install 'mmvit[eval]'") from error
    matplotlib.use("Agg")  # no window, no display needed
    curves = [_read(path, name, x) for path, name in zip(runs, _names(runs), strict=True)]
    make_folder(out.parent)
    write_atomic(out, _draw(curves, x))
    last = {run.name: {name: _last(values) for name, values in run.numbers.items()} for run in curves}
    return {"out": str(out), "x": x, "runs": last}


def _names(runs: Sequence[Path]) -> list[str]:
    folders = [run.parent if run.is_file() else run for run in runs]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _read(path: Path, name: str, x: str) -> Curves:
    log = path if path.is_file() else path / "log.jsonl"
    try:
        lines = [line for line in read_log(log) if CHANGED not in line]
        steps = np.array([line["step"] for line in lines], float)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"the log is damaged: {error}", where=str(log)) from error
    if not lines:
        hint = "pass the folder of a run that has logged a step"
        raise UsageError(f"{path} has no log", where=str(log), hint=hint)
    names = dict.fromkeys(key for line in lines for key, value in line.items() if isinstance(value, int | float))
    numbers = {key: np.array([line.get(key, np.nan) for line in lines], float) for key in names}
    if x == "samples":
        steps = steps * read_tree(log.with_name("config.yaml"))["train"]["batch_size"]
    elif x == "hours":
        if "time_s" not in numbers:
            raise UsageError(
                "the log has no times: it was written by an older version", where=str(log), hint="use --x step"
            )
        steps = numbers["time_s"] / 3600
    return Curves(name, steps, numbers)


def _draw(runs: Sequence[Curves], x: str) -> bytes:
    from matplotlib import pyplot as plt
    from matplotlib import ticker
    from matplotlib.lines import Line2D

    panels = [panel for panel in PANELS if any(np.isfinite(run.numbers.get(panel.name, np.nan)).any() for run in runs)]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    legend_rows = -(-len(runs) // 4)
    size = (WIDTH_PX / DPI, 3.6 * rows + 0.4 + 0.3 * legend_rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, dpi=DPI, sharex=True, layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for i, run in enumerate(runs):
            if panel.name in run.numbers:
                _curve(axes, run, panel, COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
        axes.set_title(panel.title, fontsize=12, loc="left")
        axes.set_xlabel(X_LABELS[x])
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if x != "hours" else "{x:g}")
        if panel.log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    styles = [(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(len(runs))]
    handles = [Line2D([], [], color=colour, linestyle=dash, linewidth=2.5) for colour, dash in styles]
    names = [run.name for run in runs]
    if any(np.nanmax(run.numbers.get(SKIPPED, np.zeros(1)), initial=0) > 0 for run in runs):
        handles.append(Line2D([], [], color="black", marker="v", linestyle=""))
        names.append("steps skipped")
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 5), frameon=False, fontsize=12)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    plt.close(figure)
    return image.getvalue()


def _curve(axes: Any, run: Curves, panel: Panel, colour: str, dash: str) -> None:
    values = run.numbers[panel.name] * panel.factor
    there = np.isfinite(values) & ((values > 0) if panel.log_scale else True)
    x, y = run.x[there], values[there]
    style = {"color": colour, "linestyle": dash, "linewidth": 1.8, "zorder": 3}
    if panel.name in NOISY and len(y) >= 20:
        some = slice(None, None, -(-len(y) // MAX_RAW_POINTS))
        axes.plot(x[some], y[some], color=colour, alpha=0.25, linewidth=0.5)
        y = np.exp(_smoothed(np.log(y))) if panel.log_scale else _smoothed(y)
    axes.plot(x, y, marker="." if len(y) < 20 else None, **style)
    if panel.name in ("loss", "grad_norm") and SKIPPED in run.numbers:
        so_far = np.nan_to_num(run.numbers[SKIPPED])
        at = run.x[np.diff(so_far, prepend=0.0) > 0]
        axes.plot(at, np.full(len(at), 0.97), "v", color=colour, markersize=5, transform=axes.get_xaxis_transform())


def _smoothed(values: Numbers) -> Numbers:
    """Return the moving average over a window of 1/25 of the curve."""
    half = max(len(values) // 50, 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _last(values: Numbers) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None
