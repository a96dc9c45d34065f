"""Counts and distributions of what shards hold, in numbers, in words and as a picture."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.core.errors import UsageError
from data_tools.core.files import write_atomic
from data_tools.sample.table import shard_metadata
from data_tools.tar.location import LocationLike
from data_tools.tar.open import open_file

# Row of the printed table: path in the numbers, unit, decimals.
_ROWS = {
    "samples a shard": (("samples_a_shard",), "", 0),
    "picture width": (("pictures", "width"), " px", 0),
    "picture height": (("pictures", "height"), " px", 0),
    "picture width / height": (("pictures", "aspect"), "", 2),
    "picture file": (("pictures", "bytes"), " bytes", 0),
    "caption characters": (("captions", "characters"), "", 0),
    "caption words": (("captions", "words"), "", 0),
    "samples a label": (("labels", "samples"), "", 0),
}
_COLUMNS = ("least", "median", "mean", "p95", "most")
_MOST_NAMED = 12
_MOST_DRAWN = 9

_COLOUR, _LIGHT, _GREY = "#31688e", "#cfdfe9", "#555555"
_ASPECTS = {1 / 3: "1:3", 1 / 2: "1:2", 3 / 4: "3:4", 1: "1:1", 4 / 3: "4:3", 16 / 9: "16:9", 3: "3:1"}
_LANGUAGES = {"und": "undecided", "zxx": "no language"}


def shard_stats(
    tars: Sequence[LocationLike], *, num_workers: int | None = None, engine: str = "local"
) -> tuple[dict[str, Any], pa.Table]:
    """Return the numbers of `summarise`, with the size of the tars, and the table they were taken from.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        CheckpointError, DataError: as `shard_metadata`.
    """
    table = shard_metadata(tars, num_workers=num_workers, engine=engine)
    return {"bytes": sum(open_file(tar).size for tar in tars)} | summarise(table), table


def summarise(table: pa.Table) -> dict[str, Any]:
    """Return counts and distributions of a table of `shard_metadata`, as they are printed with --json.

    A distribution is {least, median, mean, p95, most}, None without values. Duplicates: `groups` of samples with equal
    content, and the `surplus`, that is, how many could go so that one of each group stays.
    """
    labels = Counter(_values(table, "label").tolist())
    per_shard = Counter(table.column("shard").to_pylist())
    return {
        "shards": len(per_shard),
        "samples": table.num_rows,
        "samples_a_shard": _spread(np.array(list(per_shard.values()))),
        "bad_samples": _counts(table, "bad"),
        "pictures": {
            "count": len(table) - table.column("width").null_count,
            "formats": _counts(table, "image_format"),
            "width": _spread(_values(table, "width")),
            "height": _spread(_values(table, "height")),
            "aspect": _spread(_values(table, "aspect")),
            "bytes": _spread(_values(table, "image_bytes")),
            "duplicates": _duplicates(table, "image_sha256"),
        },
        "captions": {
            "count": len(table) - table.column("caption").null_count,
            "characters": _spread(_values(table, "caption_chars")),
            "words": _spread(_values(table, "caption_words")),
            "scripts": _counts(table, "script"),
            "languages": _counts(table, "language"),
            "duplicates": _duplicates(table, "caption"),
        },
        "labels": {"count": labels.total(), "different": len(labels), "samples": _spread(np.array([*labels.values()]))},
    }


def _values(table: pa.Table, column: str) -> NDArray[Any]:
    return np.asarray(table.column(column).drop_null())


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    """Return the values with their numbers, most first."""
    counts = {row["values"]: row["counts"] for row in table.column(column).drop_null().value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _spread(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    median, p95 = np.percentile(values, [50, 95])
    found = (values.min(), median, values.mean(), p95, values.max())
    return {name: round(float(value), 3) for name, value in zip(_COLUMNS, found, strict=True)}


def _duplicates(table: pa.Table, column: str) -> dict[str, int]:
    several = [count for count in _counts(table, column).values() if count > 1]
    return {"groups": len(several), "samples": sum(several), "surplus": sum(several) - len(several)}


def describe(stats: dict[str, Any]) -> str:
    """Return the numbers of `shard_stats` in words."""
    pictures, captions, labels = stats["pictures"], stats["captions"], stats["labels"]
    lines = [_in_short(stats), "", *_spreads(stats)]
    lines += ["", f"pictures    {pictures['count']:,}: {_shares(pictures['formats'])}"]
    lines.append(f"captions    {captions['count']:,}: {_shares(captions['scripts'])}")
    if captions["languages"]:
        lines.append(f"languages   {_shares(captions['languages'])}")
    elif captions["count"]:
        lines.append('languages   not determined; pip install "mmvit[data]"')
    lines.append(f"labels      {labels['count']:,} samples have one, {labels['different']:,} different")
    lines += [
        f"duplicates  {_told_duplicates(pictures['duplicates'], 'picture')}",
        f"            {_told_duplicates(captions['duplicates'], 'caption')}",
    ]
    if stats["bad_samples"]:
        lines.append(f"bad         {_shares(stats['bad_samples'])}: see mmvit-data check")
    return "\n".join(lines)


def _in_short(stats: dict[str, Any]) -> str:
    return f"shards: {stats['shards']:,}, samples: {stats['samples']:,}, size: {stats['bytes'] / 1e6:,.1f} MB"


def _spreads(stats: dict[str, Any]) -> list[str]:
    header = f"{'':24}" + "".join(f"{name:>12}" for name in ("least", "median", "mean", "95 %", "most"))
    lines = [header]
    for name, (path, unit, decimals) in _ROWS.items():
        spread: Any = stats
        for part in path:
            spread = spread[part]
        if spread is not None:
            lines.append(f"{name:24}" + "".join(f"{spread[column]:12,.{decimals}f}" for column in _COLUMNS) + unit)
    return lines


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    shown = [f"{name} {count:,} ({count / total:.1%})" for name, count in list(counts.items())[:_MOST_NAMED]]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f", {rest} more" if rest else "") if shown else "none"


def _told_duplicates(found: dict[str, int], what: str) -> str:
    if not found["groups"]:
        return f"no {what} is there twice"
    each = "each" if found["groups"] > 1 else "it"
    return (
        f"{found['samples']:,} samples share a {what} with another one, byte for byte "
        f"({found['groups']:,} different; {found['surplus']:,} could go, keeping {each} once)"
    )


def draw_stats(path: Path, stats: dict[str, Any], table: pa.Table, title: str) -> None:
    """Draw caption lengths, picture sizes, languages (or scripts) and aspect ratios as a PNG.

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
        raise UsageError("a picture needs matplotlib", hint='pip install "mmvit[data]"') from None
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
        figure.suptitle(f"{title}\n{_in_short(stats)}", fontsize=14)
        _draw_captions(axes[0, 0], _values(table, "caption_chars"))
        _draw_sizes(axes[0, 1], _values(table, "width"), _values(table, "height"))
        _draw_languages(axes[1, 0], stats["captions"])
        _draw_aspects(axes[1, 1], _values(table, "aspect"))
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
    if not _begin(axes, "Picture size", len(width)):
        return
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import NullLocator

    sizes, counts = np.unique(np.stack([width, height]), axis=1, return_counts=True)
    share = counts.max() / len(width)
    if share >= 0.1:
        axes.set_title(f"Picture size: {100 * share:.0f} % are {' x '.join(map(str, sizes[:, counts.argmax()]))}")
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
    """Set the title; return whether there is something to draw, and say so where there is not."""
    axes.set_title(title)
    if not count:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set(xticks=[], yticks=[])
    return bool(count)
