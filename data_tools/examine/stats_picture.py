"""The distributions of what shards hold as one PNG: caption lengths, image sizes, languages and aspect ratios."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.core.errors import UsageError
from data_tools.core.files import write_atomic
from data_tools.examine.stats import column_values, headline

_MOST_DRAWN = 9
_COLOUR, _LIGHT, _GREY = "#31688e", "#cfdfe9", "#555555"
_ASPECTS = {1 / 3: "1:3", 1 / 2: "1:2", 3 / 4: "3:4", 1: "1:1", 4 / 3: "4:3", 16 / 9: "16:9", 3: "3:1"}
_LANGUAGES = {"und": "undecided", "zxx": "no language"}


def draw_stats(path: Path, stats: dict[str, Any], table: pa.Table, title: str) -> None:
    """Draw caption lengths, image sizes, languages (or scripts) and aspect ratios as a PNG.

    Args:
        path: of the PNG.
        stats: of `shard_stats`.
        table: of `shard_stats`.
        title: what the shards are.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("plots need matplotlib", hint='pip install "mmvit[data]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GREY,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(12, 8.2))
        figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
        figure.suptitle(f"{title}\n{headline(stats)}", fontsize=14)
        _draw_captions(axes[0, 0], column_values(table, "caption_chars"))
        _draw_sizes(axes[0, 1], column_values(table, "width"), column_values(table, "height"))
        _draw_languages(axes[1, 0], stats["captions"])
        _draw_aspects(axes[1, 1], column_values(table, "aspect"))
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        plt.close(figure)
    write_atomic(path, picture.getvalue())


def _draw_captions(axes: Any, lengths: NDArray[Any]) -> None:
    if not _begin(axes, "Caption length", len(lengths)):
        return
    most = int(np.percentile(lengths, 99.5)) + 1
    step = -(-most // 50)  # whole characters a bar: bars of uneven widths would draw combs that are not in the data
    axes.hist(lengths, bins=np.arange(0, most + step, step) - 0.5, color=_COLOUR, edgecolor="white", linewidth=0.4)
    median = int(np.median(lengths))
    axes.axvline(median, color="black", linewidth=1, linestyle=":")
    axes.set_title(f"Caption length: median {median} characters")
    longer = int((lengths > most).sum())
    note = f" ({longer:,} captions are longer, up to {lengths.max():,})" if longer else ""
    axes.set(xlabel=f"characters{note}", ylabel="samples", xlim=(0, None))
    axes.grid(axis="y", alpha=0.25)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_sizes(axes: Any, width: NDArray[Any], height: NDArray[Any]) -> None:
    if not _begin(axes, "Image size", len(width)):
        return
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import NullLocator

    sizes, counts = np.unique(np.stack([width, height]), axis=1, return_counts=True)
    share = counts.max() / len(width)
    if share >= 0.1:
        axes.set_title(f"Image size: {100 * share:.0f} % are {' x '.join(map(str, sizes[:, counts.argmax()]))}")
    least, most = sizes.min() / 1.5, sizes.max() * 1.5
    bins = np.geomspace(least, most, 48)
    colours = LinearSegmentedColormap.from_list("samples", [_LIGHT, _COLOUR, "#0b2239"])
    drawn = axes.hist2d(width, height, bins=[bins, bins], cmap=colours, norm=LogNorm(1, None), cmin=1)[3]
    axes.plot([least, most], [least, most], color=_GREY, linewidth=0.8, linestyle=":")
    ticks = [2**power for power in range(17) if least <= 2**power <= most]
    axes.set(xscale="log", yscale="log", xlabel="width, px", ylabel="height, px")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_minor_locator(NullLocator())
    axes.figure.colorbar(drawn, ax=axes, label="samples", format="{x:,.0f}")
    axes.grid(alpha=0.25)


def _draw_languages(axes: Any, captions: dict[str, Any]) -> None:
    kind = "languages" if captions["languages"] else "scripts"
    counts = captions[kind]
    if not _begin(axes, f"{kind.capitalize()} of the captions", len(counts)):
        return
    total = sum(counts.values())
    shares = {_LANGUAGES.get(name, name): 100 * count / total for name, count in list(counts.items())[:_MOST_DRAWN]}
    if len(counts) > len(shares):
        shares[f"{len(counts) - len(shares)} others"] = 100 - sum(shares.values())
    colours = [_LIGHT if name in _LANGUAGES.values() or name.endswith("others") else _COLOUR for name in shares]
    bars = axes.barh(list(shares), list(shares.values()), color=colours)
    axes.bar_label(bars, [f"{share:.1f} %" for share in shares.values()], padding=4, color=_GREY)
    axes.set(xlim=(0, 1.15 * max(shares.values())), ylim=(max(len(shares), 5) - 0.4, -0.6))
    axes.set_xlabel("% of the captions" + (", by ISO 639 code" if kind == "languages" else ""))
    axes.tick_params(axis="y", length=0)


def _draw_aspects(axes: Any, aspects: NDArray[Any]) -> None:
    if not _begin(axes, "Aspect ratio", len(aspects)):
        return
    bins = np.geomspace(1 / 4, 4, 62)  # 61 bars: 1:1 is in the middle of one
    axes.hist(aspects.clip(bins[0], bins[-1]), bins=bins, color=_COLOUR, edgecolor="white", linewidth=0.4)
    outside = int(((aspects < bins[0]) | (aspects > bins[-1])).sum())
    note = f" ({outside:,} beyond 4:1 are in the outermost bars)" if outside else ""
    axes.set(xscale="log", xlim=(bins[0], bins[-1]), xlabel=f"width : height{note}", ylabel="samples")
    axes.set_xticks(list(_ASPECTS), _ASPECTS.values())
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.25)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _begin(axes: Any, title: str, count: int) -> bool:
    """Set the title; return whether there is something to draw, and otherwise write "none"."""
    axes.set_title(title)
    if not count:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set(xticks=[], yticks=[])
    return bool(count)
